"""Telling images apart with classifiers: loading, data, scores."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    EvalPrediction,
    PretrainedConfig,
    PreTrainedModel,
    default_data_collator,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from recipes.support import inputs
from recipes.support.arguments import UserError
from recipes.support.reporting import RunResult
from recipes.tasks.base import Task

OUTPUT = "class"  # what `compute` gives beside the logits, for messages


@dataclass
class ModelArguments(inputs.ModelArguments):
    """Which image classifier, or backbone to put a new head on, is adapted."""

    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Pixels of the shorter edge, where a square of as many is cut out of the middle. Default: what the "
            "model's image processor does."
        },
    )


@dataclass
class DataArguments(inputs.DataArguments):
    """What the model is trained and evaluated on."""

    image_column: str = field(default="image", metadata={"help": "Column of images, or of paths of image files."})
    label_column: str = field(default="label", metadata={"help": "Column of the classes: names or whole numbers."})
    labels: list[str] = field(
        default_factory=list, metadata={"help": "Keep the images of these classes alone. Default: all."}
    )
    shots: int | None = field(
        default=None, metadata={"help": "Train on a random subset with as many images of every class. Default: all."}
    )
    data_seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Draw the subset of --shots once with each of these seeds."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on a random subset of this size, the same for all runs."}
    )


@dataclass
class ImageData:
    """Training and validation images.

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
        """Returns all training images, or a random subset with equally many of every class.

        A smaller subset drawn with the same seed is part of a larger one.
        """
        if self.args.shots is None:
            return self.train
        classes = np.array([self.numbers[value] for value in self.train[self.args.label_column]])
        order = np.random.default_rng(data_seed).permutation(len(classes))
        few = [order[classes[order] == number][: self.args.shots] for number in range(len(self.labels))]
        return self.train.select(np.concatenate(few))

    def encoded(self, split: datasets.Dataset, processor: BaseImageProcessor) -> datasets.Dataset:
        """Returns a split whose rows are pixel values and labels, made when they are read."""

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            images = [image.convert("RGB") for image in batch[self.args.image_column]]
            return {
                "pixel_values": processor(images, return_tensors="pt")["pixel_values"],
                "labels": [self.numbers[value] for value in batch[self.args.label_column]],
            }

        return split.with_transform(encode)


@dataclass
class Classifier:
    """An image classifier.

    Attributes:
        model: has an output for every class.
        processor: turns images into pixel values.
        head: names of the modules that make the outputs.
        new_head: whether they are untrained.
    """

    model: PreTrainedModel
    processor: BaseImageProcessor
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


def load_classifier(args: ModelArguments, labels: Sequence[str]) -> Classifier:
    """Loads a model and its image processor. It keeps its head if that is for the same classes, in the same order."""
    name = inputs.model_folder(args)
    inputs.check_counts(args, "image_size")
    with inputs.loading("model_name_or_path", name):
        config = AutoConfig.from_pretrained(name)
        same_labels = list(config.id2label.values()) == list(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
        config.problem_type = "single_label_classification"
        model, report = AutoModelForImageClassification.from_pretrained(
            name, config=config, dtype=args.dtype, ignore_mismatched_sizes=True, output_loading_info=True
        )
    head = _head(model)
    untrained = any(key.startswith(f"{module}.") for key in report["missing_keys"] for module in head)
    return Classifier(model, _load_processor(args, name, config), head, untrained or not same_labels)


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


def _load_processor(args: ModelArguments, name: str, config: PretrainedConfig) -> BaseImageProcessor:
    try:
        processor = AutoImageProcessor.from_pretrained(name, backend="pil")
        image_size = args.image_size
    except OSError:
        # The model is there and its processor is not: the defaults of its architecture.
        if type(config) not in IMAGE_PROCESSOR_MAPPING:
            raise UserError(f"model_name_or_path: {name} comes without an image processor") from None
        classes: Any = IMAGE_PROCESSOR_MAPPING[type(config)]
        processor = classes["pil"]()
        image_size = args.image_size or getattr(config, "image_size", None)
    if image_size is None:
        return processor
    values = processor.to_dict()
    values["size"] = {key: image_size for key in dict(processor.size)}
    if values.get("crop_size") is not None:
        values["crop_size"] = {"height": image_size, "width": image_size}
    return type(processor).from_dict(values)


def load_image_data(args: DataArguments) -> ImageData:
    """Loads and checks the data."""
    inputs.check_counts(args, "shots", "max_eval_samples")
    if args.shots is None and len(args.data_seeds) > 1:
        raise UserError(f"data_seeds: without --shots all of {args.data_seeds} train on the same images")
    if args.image_column == args.label_column:
        raise UserError(f"image_column and label_column are both {args.image_column!r}")
    names = [args.train_split, args.eval_split]
    columns = [args.image_column, args.label_column]
    splits = [split.select_columns(columns) for split in inputs.load_splits(args, columns)]
    values = [_checked_classes(split, name, args.label_column) for split, name in zip(splits, names)]
    splits = [_checked_images(split, name, args.image_column) for split, name in zip(splits, names)]

    feature = splits[0].features[args.label_column]
    text = feature.int2str if isinstance(feature, datasets.ClassLabel) else str
    classes = {text(value): value for value in sorted(set(values[0] + values[1]))}
    for label in args.labels:
        if label not in classes:
            raise UserError(f"labels: {label!r} is not a class of {args.dataset_name}; it has {_listed(classes)}")
    labels = [label for label in classes if not args.labels or label in args.labels]
    if len(labels) < 2:
        raise UserError(f"{args.dataset_name}: {_listed(labels)} is the only class; a classifier needs two")
    numbers = {classes[label]: number for number, label in enumerate(labels)}
    sizes = [Counter(numbers[value] for value in column if value in numbers) for column in values]
    if sizes[0].keys() != sizes[1].keys():
        missing = [_listed([label for i, label in enumerate(labels) if i not in size]) for size in sizes]
        raise UserError(
            f"{args.dataset_name}: the splits differ in their classes: {names[0]!r} lacks {missing[0]}, "
            f"{names[1]!r} lacks {missing[1]}; --labels names the classes to keep"
        )
    small = [f"{label!r} has {sizes[0][number]}" for number, label in enumerate(labels)]
    small = [text for number, text in enumerate(small) if args.shots is not None and sizes[0][number] < args.shots]
    if small:
        raise UserError(f"shots is {args.shots}, but in split {names[0]!r} class {', class '.join(small)}")
    if args.labels:
        splits = [
            split.select([row for row, value in enumerate(column) if value in numbers])
            for split, column in zip(splits, values)
        ]
    return ImageData(splits[0], inputs.random_subset(splits[1], args.max_eval_samples), labels, numbers, args)


def _listed(labels: Iterable[str]) -> str:
    shown = [repr(label) for label in labels]
    return ", ".join(shown[:20] + ["..."] * (len(shown) > 20)) or "none"


def _checked_classes(split: datasets.Dataset, name: str, column: str) -> list[Any]:
    feature = split.features[column]
    if not str(getattr(feature, "dtype", "")).startswith(("string", "large_string", "int", "uint", "bool")):
        raise UserError(f"column {column!r} of split {name!r} holds {feature}; classes are names or whole numbers")
    values = list(split[column])
    unknown = sum(value is None or (isinstance(feature, datasets.ClassLabel) and value < 0) for value in values)
    if unknown:
        raise UserError(f"column {column!r} of split {name!r} names no class in {unknown} of {len(values)} rows")
    return values


def _checked_images(split: datasets.Dataset, name: str, column: str) -> datasets.Dataset:
    feature = split.features[column]
    try:
        # Paths and bytes become images too.
        split = split if isinstance(feature, datasets.Image) else split.cast_column(column, datasets.Image())
        image = split[0][column]
    except (OSError, TypeError, ValueError, pa.ArrowException) as error:
        raise UserError(f"column {column!r} of split {name!r}, {feature}, holds no images: {error}") from error
    if image is None or split.data.column(column).null_count:
        raise UserError(f"column {column!r} of split {name!r} has rows without an image")
    return split


def check_model(classifier: Classifier, pixels: torch.Tensor) -> None:
    """Refuses a model that takes no images of the size that its processor makes, or gives no loss."""
    height, width = pixels.shape[-2:]
    patch = getattr(classifier.model.config, "patch_size", None)
    if isinstance(patch, int) and (height % patch or width % patch):
        raise UserError(
            f"image_size: images of {height} x {width} pixels are no whole number of the model's patches of {patch}; "
            f"{height // patch * patch or patch} would be"
        )
    if "labels" not in inspect.signature(classifier.model.forward).parameters:
        raise UserError(f"model_name_or_path: a {type(classifier.model).__name__} cannot be trained, it has no loss")
    try:
        with torch.no_grad():
            classifier.model.eval()(pixel_values=pixels, **forward_options(classifier.model))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"image_size: the model does not take images of {height} x {width} pixels: {error}") from error


def forward_options(model: PreTrainedModel | PeftModel) -> dict[str, bool]:
    """Returns what the model needs beside pixels to take images of another size than it was trained with."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    # Others interpolate their position embeddings unasked, or have none.
    asked = "interpolate_pos_encoding" in inspect.signature(base.forward).parameters
    return {"interpolate_pos_encoding": True} if asked else {}


def collate(rows: list[dict[str, Any]], options: dict[str, bool]) -> dict[str, Any]:
    """Returns a batch, with what else the model is called with."""
    return {**default_data_collator(rows), **options}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Returns the Trainer's metric; its predictions are classes."""
    computed = inputs.load_metric("accuracy").compute(
        predictions=prediction.predictions, references=prediction.label_ids
    )
    return dict(computed)


def likeliest(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Returns classes in place of logits, which the Trainer would keep."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def load_saved(args: ModelArguments, adapter: Path) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Loads the base model of a saved adapter, with the adapter's classes, and its image processor."""
    classifier = load_classifier(args, list(AutoConfig.from_pretrained(adapter).id2label.values()))
    return classifier.model, classifier.processor


@torch.no_grad()
def compute(
    model: PreTrainedModel | PeftModel, processor: BaseImageProcessor, row: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the logits of an image, and the likeliest class."""
    logits = model(pixel_values=row["pixel_values"][None].to(model.device), **forward_options(model)).logits[0].cpu()
    return logits, logits.argmax(keepdim=True)


def describe(
    model: PreTrainedModel | PeftModel,
    processor: BaseImageProcessor,
    row: dict[str, torch.Tensor],
    chosen: torch.Tensor,
) -> str:
    """Returns the class of an image and the one that it was given."""
    config: Any = model.config
    names = config.id2label
    return f"image of {names[int(row['label'])]!r} -> {names[int(chosen)]!r}"


@dataclass
class ImageTask(Task):
    """Telling classes apart after a subset of the training images.

    Attributes:
        classifier: the base model and its head.
        data: what it is trained and evaluated on.
        data_seed: draws the subset.
    """

    classifier: Classifier
    data: ImageData
    data_seed: int

    hub_task = "image-classification"

    @property
    def dataset(self) -> str:
        return inputs.dataset_title(self.data.args)

    @property
    def head(self) -> Sequence[str]:
        return self.classifier.head

    def fresh_model(self) -> PreTrainedModel:
        return self.classifier.fresh_model()

    def trainer_arguments(self, model: nn.Module) -> dict[str, Any]:
        return {
            "train_dataset": self.data.encoded(self.data.training_set(self.data_seed), self.processor),
            "eval_dataset": self.data.encoded(self.data.validation, self.processor),
            "data_collator": partial(collate, options=forward_options(self.classifier.model)),
            "compute_metrics": accuracy,
            "preprocess_logits_for_metrics": likeliest,
        }

    def score(self, model: PeftModel, evaluation: Mapping[str, float], result: RunResult) -> None:
        result.metrics = {"accuracy": evaluation["eval_accuracy"]}
        result.data_seed = self.data_seed

    def probes(self) -> list[dict[str, torch.Tensor]]:
        rows = self.data.encoded(self.data.validation, self.processor)[:2]
        return [
            {"pixel_values": pixels, "label": torch.tensor(label)}
            for pixels, label in zip(rows["pixel_values"], rows["labels"])
        ]

    def save(self, model: PeftModel, folder: Path) -> None:
        """Saves adapter and head, the names of the classes in the model's configuration, and the image processor."""
        super().save(model, folder)
        model.config.save_pretrained(folder)
        self.processor.save_pretrained(folder)
