"""Telling classes apart, of images or of texts: which classes there are, samples of each, and models with a head."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import torch
from peft import PeftModel
from transformers import AutoConfig, EvalPrediction, PreTrainedModel

from recipes.support import inputs
from recipes.support.arguments import UserError
from recipes.support.reporting import RunResult
from recipes.tasks.base import Task


@dataclass
class DataArguments(inputs.DataArguments):
    """What a classifier is trained and evaluated on."""

    label_column: str = field(default="label", metadata={"help": "Column of the classes: names or whole numbers."})
    labels: list[str] = field(
        default_factory=list, metadata={"help": "Keep the samples of these classes alone. Default: all."}
    )
    shots: int | None = field(
        default=None, metadata={"help": "Train on a random subset with as many samples of every class. Default: all."}
    )
    data_seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Draw the subset of --shots once with each of these seeds."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on a random subset of this size, the same for all runs."}
    )


@dataclass
class LabelledData:
    """Training and validation samples with their classes.

    Attributes:
        train: the training split.
        validation: the validation split, or a random part of it.
        labels: names of the classes.
        numbers: the class of every value of the label column, as its place in `labels`.
        args: what was asked for.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    labels: list[str]
    numbers: dict[Any, int]
    args: DataArguments

    def training_set(self, data_seed: int) -> datasets.Dataset:
        """Returns all training samples, or a random subset with equally many of every class.

        A smaller subset drawn with the same seed is part of a larger one.
        """
        return self.train if self.args.shots is None else self._of_every_class(data_seed, slice(self.args.shots))

    def held_out_set(self, data_seed: int, shots: int) -> datasets.Dataset:
        """Returns `shots` samples of every class that `training_set` does not have, in a random order.

        Raises:
            UserError: it leaves none, or fewer of a class.
        """
        if self.args.shots is None:
            raise UserError("shots: give it; the samples of every class that it leaves are those that can be held out")
        found = self._of_every_class(data_seed, slice(self.args.shots, self.args.shots + shots))
        if len(found) < shots * len(self.labels):
            raise UserError(
                f"{shots} samples of every class cannot be held out beside {self.args.shots} that are trained on: "
                f"split {self.args.train_split!r} has too few of one"
            )
        return found.select(np.random.default_rng(data_seed).permutation(len(found)))

    def _of_every_class(self, data_seed: int, places: slice) -> datasets.Dataset:
        """Returns the samples of every class that have some places in a random order."""
        classes = np.array([self.numbers[value] for value in self.train[self.args.label_column]])
        order = np.random.default_rng(data_seed).permutation(len(classes))
        few = [order[classes[order] == number][places] for number in range(len(self.labels))]
        return self.train.select(np.concatenate(few))


def check_arguments(args: DataArguments, drawn: bool = False) -> None:
    """Raises a UserError for what shows without the data.

    Args:
        args: what was asked for.
        drawn: whether something else than `shots` is drawn with the data seeds.
    """
    inputs.check_counts(args, "shots", "max_eval_samples")
    inputs.check_distinct(args, "data_seeds")
    if args.shots is None and not drawn and args.data_seeds != [0]:
        raise UserError(f"data_seeds: without --shots nothing is drawn with {args.data_seeds}; leave it out")


def keep_classes(
    splits: Sequence[datasets.Dataset], args: DataArguments
) -> tuple[list[str], dict[Any, int], list[datasets.Dataset]]:
    """Finds the classes of a training and a validation split, and checks that both have them all.

    Args:
        splits: the two splits.
        args: names the label column, and the classes to keep.

    Returns:
        The names of the classes; the class of every value of the label column, as its place among the names; the splits
        with the samples of these classes.

    Raises:
        UserError: the column holds no classes, or the splits, `labels` and `shots` do not fit together.
    """
    names, column = [args.train_split, args.eval_split], args.label_column
    values = [checked_classes(split, name, column) for split, name in zip(splits, names)]
    feature = splits[0].features[column]
    text = feature.int2str if isinstance(feature, datasets.ClassLabel) else str
    classes = {text(value): value for value in sorted(set(values[0] + values[1]))}
    for label in args.labels:
        if label not in classes:
            raise UserError(f"labels: {label!r} is not a class of {args.dataset_name}; it has {listed(classes)}")
    labels = [label for label in classes if not args.labels or label in args.labels]
    if len(labels) < 2:
        raise UserError(f"{args.dataset_name}: {listed(labels)} is the only class; a classifier needs two")
    numbers = {classes[label]: number for number, label in enumerate(labels)}
    sizes = [Counter(numbers[value] for value in of_split if value in numbers) for of_split in values]
    if sizes[0].keys() != sizes[1].keys():
        missing = [listed([label for i, label in enumerate(labels) if i not in size]) for size in sizes]
        raise UserError(
            f"{args.dataset_name}: the splits differ in their classes: {names[0]!r} lacks {missing[0]}, "
            f"{names[1]!r} lacks {missing[1]}; --labels names the classes to keep"
        )
    small = [f"{label!r} has {sizes[0][number]}" for number, label in enumerate(labels)]
    small = [text for number, text in enumerate(small) if args.shots is not None and sizes[0][number] < args.shots]
    if small:
        raise UserError(f"shots is {args.shots}, but in split {names[0]!r} class {', class '.join(small)}")
    kept = list(splits)
    if args.labels:
        kept = [
            split.select([row for row, value in enumerate(of_split) if value in numbers])
            for split, of_split in zip(splits, values)
        ]
    return labels, numbers, kept


def listed(labels: Iterable[str]) -> str:
    """Returns the names of classes, the first twenty, for a message."""
    shown = [repr(label) for label in labels]
    return ", ".join(shown[:20] + ["..."] * (len(shown) > 20)) or "none"


def checked_classes(split: datasets.Dataset, name: str, column: str) -> list[Any]:
    """Returns the values of a column, which must all be classes.

    Args:
        split: has the column.
        name: of the split, for messages.
        column: of the classes.
    """
    feature = split.features[column]
    if not str(getattr(feature, "dtype", "")).startswith(("string", "large_string", "int", "uint", "bool")):
        raise UserError(f"column {column!r} of split {name!r} holds {feature}; classes are names or whole numbers")
    values = list(split[column])
    unknown = sum(value is None or (isinstance(feature, datasets.ClassLabel) and value < 0) for value in values)
    if unknown:
        raise UserError(f"column {column!r} of split {name!r} names no class in {unknown} of {len(values)} rows")
    return values


@dataclass
class Classifier:
    """A classifier.

    Attributes:
        model: has an output for every class.
        head: names of the modules that make the outputs.
        new_head: whether they are untrained.
    """

    model: PreTrainedModel
    head: list[str]
    new_head: bool

    def fresh_model(self) -> PreTrainedModel:
        """Returns a copy of the model; a new head is drawn again."""
        model = copy.deepcopy(self.model)
        if self.new_head:
            for name in self.head:
                for module in model.get_submodule(name).modules():
                    if hasattr(module, "reset_parameters"):
                        module.reset_parameters()  # type: ignore[operator]
        return model


def load_classifier(args: inputs.ModelArguments, labels: Sequence[str], auto_class: Any) -> Classifier:
    """Loads a model. It keeps its head if that is for the same classes, in the same order.

    Args:
        args: which model.
        labels: names of the classes.
        auto_class: the auto class of transformers for the kind of model, such as `AutoModelForImageClassification`.
    """
    name = inputs.model_folder(args)
    with inputs.loading("model_name_or_path", name):
        config = AutoConfig.from_pretrained(name)
        same_labels = list(config.id2label.values()) == list(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
        config.problem_type = "single_label_classification"
        model, report = auto_class.from_pretrained(
            name, config=config, dtype=args.dtype, ignore_mismatched_sizes=True, output_loading_info=True
        )
    head, missing = _head(model), set(report["missing_keys"])
    untrained = any(key.startswith(f"{module}.") for key in missing for module in head)
    # Layers between backbone and head that the weights lack, such as a pooler, are new too: frozen at what was drawn
    # here, without a seed, they would be noise.
    for module_name, module in model.named_modules():
        own = [f"{module_name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
        if own and hasattr(module, "reset_parameters") and missing.issuperset(own) and module_name not in head:
            head, untrained = sorted([*head, module_name]), True
    return Classifier(model, head, untrained or not same_labels)


def _head(model: PreTrainedModel) -> list[str]:
    """Returns the modules whose shapes depend on the number of classes."""
    shapes = []
    for more in (0, 1):
        config: Any = copy.deepcopy(model.config)
        config.num_labels += more
        with torch.device("meta"):
            other = type(model)(config)
        shapes.append({name: parameter.shape for name, parameter in other.named_parameters()})
    return sorted({name.rpartition(".")[0] for name, shape in shapes[0].items() if shapes[1][name] != shape})


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Returns the Trainer's metric; its predictions are classes."""
    computed = inputs.load_metric("accuracy").compute(
        predictions=prediction.predictions, references=prediction.label_ids
    )
    return dict(computed)


def likeliest(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Returns classes in place of logits, which the Trainer would keep."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


@dataclass
class ClassificationTask(Task):
    """Telling classes apart after a subset of the training samples.

    Attributes:
        classifier: the base model and its head.
        data: what it is trained and evaluated on.
        data_seed: draws the subset.
    """

    classifier: Classifier
    data: LabelledData
    data_seed: int

    @property
    def dataset(self) -> str:
        return inputs.dataset_title(self.data.args)

    @property
    def head(self) -> Sequence[str]:
        return self.classifier.head

    def fresh_model(self) -> PreTrainedModel:
        return self.classifier.fresh_model()

    def score(self, model: PeftModel, evaluation: Mapping[str, float], result: RunResult) -> None:
        result.metrics = {"accuracy": evaluation["eval_accuracy"]}
        result.data_seed = self.data_seed
