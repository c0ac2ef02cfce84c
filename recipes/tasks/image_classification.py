"""Telling images apart with classifiers: loading, data, scores."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PretrainedConfig,
    PreTrainedModel,
    default_data_collator,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from recipes.support import inputs
from recipes.support.arguments import UserError
from recipes.tasks import classification

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
class DataArguments(classification.DataArguments):
    """What the model is trained and evaluated on."""

    image_column: str = field(default="image", metadata={"help": "Column of images, or of paths of image files."})


@dataclass
class ImageData(classification.LabelledData):
    """Training and validation images."""

    args: DataArguments

    def encoded(self, split: datasets.Dataset, processor: BaseImageProcessor) -> datasets.Dataset:
        """Returns a split whose rows are pixel values and labels, made when they are read."""

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            images = [image.convert("RGB") for image in batch[self.args.image_column]]
            return {
                "pixel_values": processor(images, return_tensors="pt")["pixel_values"],
                "labels": [self.numbers[value] for value in batch[self.args.label_column]],
            }

        return split.with_transform(encode)


class ImageRows(Dataset):
    """Images that were prepared once, for programs that read them dozens of times.

    Args:
        images: rows of pixel values and labels, made when they are read.
    """

    def __init__(self, images: datasets.Dataset) -> None:
        batches = [images[start : start + 256] for start in range(0, len(images), 256)]
        self.pixel_values = torch.cat([torch.as_tensor(batch["pixel_values"]) for batch in batches])
        self.labels = [label for batch in batches for label in batch["labels"]]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}


@dataclass
class Classifier(classification.Classifier):
    """An image classifier.

    Attributes:
        processor: turns images into pixel values.
    """

    processor: BaseImageProcessor


def load_classifier(args: ModelArguments, labels: Sequence[str]) -> Classifier:
    """Loads a model and its image processor. It keeps its head if that is for the same classes, in the same order."""
    inputs.check_counts(args, "image_size")
    found = classification.load_classifier(args, labels, AutoModelForImageClassification)
    processor = _load_processor(args, inputs.model_folder(args), found.model.config)
    return Classifier(found.model, found.head, found.new_head, processor)


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


def load_image_data(args: DataArguments, drawn: bool = False) -> ImageData:
    """Loads and checks the data; `drawn` is that of `classification.check_arguments`."""
    classification.check_arguments(args, drawn)
    if args.image_column == args.label_column:
        raise UserError(f"image_column and label_column are both {args.image_column!r}")
    columns = [args.image_column, args.label_column]
    splits = [split.select_columns(columns) for split in inputs.load_splits(args, columns)]
    labels, numbers, splits = classification.keep_classes(splits, args)
    names = [args.train_split, args.eval_split]
    splits = [checked_images(split, name, args.image_column) for split, name in zip(splits, names)]
    return ImageData(splits[0], inputs.random_subset(splits[1], args.max_eval_samples), labels, numbers, args)


def checked_images(split: datasets.Dataset, name: str, column: str) -> datasets.Dataset:
    """Returns a split whose column is of images, which the column must hold.

    Args:
        split: has images, their files' paths or bytes in the column.
        name: of the split, for messages.
        column: of the images.
    """
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
class ImageTask(classification.ClassificationTask):
    """Telling classes apart after a subset of the training images."""

    classifier: Classifier
    data: ImageData

    hub_task = "image-classification"

    def trainer_arguments(self, model: nn.Module) -> dict[str, Any]:
        return {
            "train_dataset": self.data.encoded(self.data.training_set(self.data_seed), self.processor),
            "eval_dataset": self.data.encoded(self.data.validation, self.processor),
            "data_collator": partial(collate, options=forward_options(self.classifier.model)),
            "compute_metrics": classification.accuracy,
            "preprocess_logits_for_metrics": classification.likeliest,
        }

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
