"""CIFAR-10: fifty images of every class, with DINOv2 ViT-S and a head."""

from __future__ import annotations

from transformers import TrainingArguments

from recipes.tasks import image_classification
from recipes.tasks.base import Task

from .task import QualityTask


class Cifar10(QualityTask):
    """140 steps of 16 images, that is four and a half passes over 500 images, and the accuracy on 500 test images.

    With ten images of a class the head alone was as good as any adapter beside it.
    """

    name = "cifar10"
    title = "CIFAR-10, DINOv2 ViT-S"
    targets = ("q_proj", "v_proj")
    steps = 140
    batch_size = 16
    eval_batch_size = 50
    metric = "accuracy"
    known_source = "a30927316c2c"

    def load(self, training: TrainingArguments) -> Task:
        source = image_classification.ModelArguments(self.sources.need("cifar10_model"), image_size=56)
        args = image_classification.DataArguments(
            self.sources.need("cifar10_data"), eval_split="test", shots=50, max_eval_samples=500
        )
        data = image_classification.load_image_data(args)
        classifier = image_classification.load_classifier(source, data.labels)
        return image_classification.ImageTask(source, classifier.processor, training, classifier, data, data_seed=0)
