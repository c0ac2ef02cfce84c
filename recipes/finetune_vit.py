"""Adapt an image classifier to a few images of every class with NOLA, PRANC or MCNC, beside any other PEFT method.

``python -m recipes.finetune_vit`` runs the quickstart, which needs no hub; ``--help`` lists the arguments. It runs
under ``accelerate launch -m`` unchanged. The head is trained with every method; the method ``head`` trains nothing
else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments

from recipes.support.arguments import (
    HEAD,
    MethodArguments,
    UserError,
    check_output_dir,
    claim_output_dir,
    parse_arguments,
    parse_methods,
    run_main,
)
from recipes.support.reporting import RunResult, plot_losses, plot_metric, write_report
from recipes.tasks import digits
from recipes.tasks.image_classification import (
    Classifier,
    DataArguments,
    ImageData,
    ModelArguments,
    accuracy,
    check_model,
    collate,
    forward_options,
    likeliest,
    load_classifier,
    load_image_data,
)
from recipes.tasks.training import Task, run_all, set_up, train


@dataclass
class QuickstartArguments:
    """The self-made task."""

    digits: bool = field(
        default=False,
        metadata={
            "help": "Make the data (scikit-learn's digits, columns image and label) and a small ViT that knows the "
            "digits below 5, in --output_dir, in place of --model_name_or_path and --dataset_name."
        },
    )


@dataclass
class ImageTask(Task):
    """Telling classes apart after a subset of the training images."""

    classifier: Classifier
    data: ImageData
    data_seed: int

    @property
    def head(self) -> Sequence[str]:
        """The classifier's."""
        return self.classifier.head

    def fresh_model(self) -> PreTrainedModel:
        """A copy of the base model; a new head is drawn again."""
        return self.classifier.fresh_model()

    def images(self, split: datasets.Dataset) -> datasets.Dataset:
        """A split as the model's inputs."""
        return self.data.encoded(split, self.processor)

    def trainer_arguments(self) -> dict[str, Any]:
        """Data sets, collator and metric for the Trainer."""
        return {
            "train_dataset": self.images(self.data.training_set(self.data_seed)),
            "eval_dataset": self.images(self.data.validation),
            "data_collator": partial(collate, options=forward_options(self.classifier.model)),
            "compute_metrics": accuracy,
            "preprocess_logits_for_metrics": likeliest,
        }

    def score(self, model: PeftModel, evaluation: Mapping[str, float], result: RunResult) -> None:
        """Keep the accuracy."""
        result.metrics = {"accuracy": evaluation["eval_accuracy"]}
        result.data_seed = self.data_seed

    def probes(self) -> list[dict[str, torch.Tensor]]:
        """Two images."""
        rows = self.images(self.data.validation)[:2]
        return [
            {"pixel_values": pixels, "label": torch.tensor(label)}
            for pixels, label in zip(rows["pixel_values"], rows["labels"])
        ]

    def save(self, model: PeftModel, folder: Path) -> None:
        """Adapter and head, the names of the classes in the model's configuration, and the image processor."""
        super().save(model, folder)
        model.config.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def summary(data: ImageData, seeds: Sequence[int]) -> str:
    """Markdown that says what the table's numbers are over."""
    args = data.args
    runs = len(args.data_seeds) * len(seeds)
    if args.shots is None:
        trained_on = f"all {len(data.train):,} training images"
    else:
        trained_on = f"{args.shots} images a class, drawn with data seeds {', '.join(map(str, args.data_seeds))}"
    return (
        f"Every method is trained on {trained_on}, with seeds {', '.join(map(str, seeds))}: "
        f"{runs} run{'s' * (runs > 1)}. {len(data.labels)} classes, {len(data.validation):,} validation images.\n"
    )


def main(argv: Sequence[str]) -> None:
    """Run the recipe."""
    arguments = parse_arguments(
        "finetune_vit", [ModelArguments, DataArguments, MethodArguments, QuickstartArguments, TrainingArguments], argv
    )
    model_args, data_args, method_args, quickstart_args, training = arguments
    methods = parse_methods(method_args.methods, extra=[HEAD])
    seeds = method_args.seeds or [training.seed]
    for method in methods:
        method.config(None, seeds[0])
    set_up(training)
    training.remove_unused_columns = False  # images become pixel values when they are read
    is_main = PartialState().is_main_process
    if quickstart_args.digits and (model_args.model_name_or_path or data_args.dataset_name):
        raise UserError("digits makes its own model and data: leave out --model_name_or_path and --dataset_name")
    record = check_output_dir(training, arguments, method_args.overwrite_output_dir)
    PartialState().wait_for_everyone()  # no process may write before all have looked
    output_dir = Path(training.output_dir)

    if quickstart_args.digits:
        data_args.dataset_name = digits.prepare_data(output_dir)
        model_args.model_name_or_path = digits.prepare_base(output_dir, data_args.dataset_name, training.use_cpu)
    with PartialState().main_process_first():
        data = load_image_data(data_args)
        classifier = load_classifier(model_args, data.labels)
    tasks = [
        ImageTask(model_args, classifier.processor, training, classifier, data, data_seed)
        for data_seed in data_args.data_seeds
    ]
    check_model(classifier, tasks[0].images(data.validation)[:1]["pixel_values"])
    for method in methods:
        tasks[0].adapt(method, seeds[0])  # whether it fits the model shows here, before hours of training
    if is_main:
        claim_output_dir(training, record)
    PartialState().wait_for_everyone()

    runs: dict[str, Callable[[Path], RunResult]] = {}
    for method in methods:
        for task in tasks:
            for seed in seeds:
                verify = method_args.verify_adapters and task is tasks[0] and seed == seeds[0]
                runs[f"{method.folder}-data{task.data_seed}-seed{seed}"] = partial(train, task, method, seed, verify)
    results = run_all(training, runs)
    if is_main:
        plots = {
            "loss.png": partial(plot_losses, results, unit="image"),
            "accuracy.png": partial(plot_metric, results, name="accuracy"),
        }
        write_report(results, output_dir, summary(data, seeds), plots)


if __name__ == "__main__":
    run_main(main)
