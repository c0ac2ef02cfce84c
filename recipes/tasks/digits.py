"""A small task for machines without a hub: scikit-learn's handwritten digits, and a small ViT that knows half of them.

The model is trained to tell 0, 1, 2, 3 and 4 apart; the other digits are left to the adapters.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import datasets
import numpy as np
from accelerate import PartialState
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, set_seed

from recipes.support import inputs
from recipes.tasks.image_classification import DataArguments, load_image_data
from recipes.tasks.toys import make_once, train_base, write_data

_SEED = 2024
_KNOWN = ["0", "1", "2", "3", "4"]
_STEPS = 1000


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


def splits() -> dict[str, datasets.Dataset]:
    """Returns images of all ten digits, half of them for validation."""
    digits = load_digits()
    images = [Image.fromarray(np.uint8(pixels * 255 / 16)) for pixels in digits.images]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))})
    rows = train_test_split(np.arange(len(images)), test_size=0.5, random_state=_SEED, stratify=digits.target)
    found = {}
    for name, chosen in zip(("train", "validation"), rows):
        columns = {"image": [images[row] for row in chosen], "label": digits.target[chosen].tolist()}
        found[name] = datasets.Dataset.from_dict(columns, features)
    return found


def write_images(folder: Path) -> None:
    """Writes `splits` as parquet files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, split in splits().items():
        split.to_parquet(folder / f"{name}.parquet")


def make_base(folder: Path, data_folder: str, use_cpu: bool) -> None:
    """Trains the small ViT and saves it.

    It has to name the digit and how it was turned and mirrored, which makes features of more use to other digits than
    the digit alone.
    """
    data = load_image_data(DataArguments(data_folder, labels=_KNOWN))
    upright, labels = list(data.train["image"]), list(data.train["label"])
    images = [*upright, *(image.transpose(turn) for turn in Image.Transpose for image in upright)]
    classes = [len(_KNOWN) * turn + label for turn in range(1 + len(Image.Transpose)) for label in labels]
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    pixels = processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
    set_seed(_SEED)
    model = ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=4,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            id2label=dict(enumerate(map(str, range(max(classes) + 1)))),
        )
    )
    settings = {
        "max_steps": _STEPS,
        "per_device_train_batch_size": 32 // PartialState().num_processes or 1,
        "learning_rate": 1e-3,
        "weight_decay": 0.05,
        "warmup_steps": 100,
        "lr_scheduler_type": "cosine",
        "seed": _SEED,
        "use_cpu": use_cpu,
    }
    rows = [{"pixel_values": image, "labels": number} for image, number in zip(pixels, classes)]
    train_base(folder, model, processor, settings, train_dataset=rows)


def prepare_data(output_dir: Path) -> str:
    """Writes the images below a folder, in the main process, and returns their folder."""
    return write_data(output_dir / "data", write_images)


def prepare(output_dir: Path, model: inputs.ModelArguments, data: inputs.DataArguments, use_cpu: bool) -> None:
    """Makes data and base model below a folder, unless the model is there, and puts their folders in the arguments."""
    data.dataset_name = prepare_data(output_dir)
    make = partial(make_base, data_folder=data.dataset_name, use_cpu=use_cpu)
    model.model_name_or_path = make_once(output_dir / "base", "a small ViT", make)
