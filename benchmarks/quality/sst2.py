"""SST-2: the sentiment of sentences, with all-MiniLM-L6-v2 and a head."""

from __future__ import annotations

from transformers import TrainingArguments

from recipes.support import inputs
from recipes.tasks import text_classification
from recipes.tasks.base import Task

from .task import QualityTask


class Sst2(QualityTask):
    """150 steps of 16 sentences, and the whole validation split of 872."""

    name = "sst2"
    title = "SST-2, all-MiniLM-L6-v2"
    targets = ("query", "value")
    steps = 150
    batch_size = 16
    sampling = "group_by_length"
    metric = "accuracy"
    known_source = "36d28ec0594e"

    def load(self, training: TrainingArguments) -> Task:
        source = inputs.ModelArguments(self.sources.need("sst2_model"))
        args = text_classification.DataArguments(
            self.sources.need("sst2_data"), text_column="sentence", max_length=48, max_train_samples=2400
        )
        data = text_classification.load_text_data(args)
        classifier = text_classification.load_classifier(source, data.labels)
        # Batches of sentences of like length have little padding.
        order = sorted(range(len(data.validation)), key=lambda place: len(data.validation[place]["sentence"]))
        data.validation = data.validation.select(order)
        return text_classification.TextClassificationTask(
            source, classifier.tokenizer, training, classifier, data, data_seed=0
        )
