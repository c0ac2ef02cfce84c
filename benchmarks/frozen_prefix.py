"""Trainings with and without the frozen blocks below the first adapter computed once a sample, in pairs.

    python -m benchmarks.frozen_prefix              # a random ViT of the size of DINOv2 ViT-S, four minutes on one core
    python -m benchmarks.frozen_prefix --model_name_or_path <folder> --output frozen_prefix.jsonl

Each pair trains twice from the same start on random images, with NOLA in the last four of twelve layers, in evaluation
mode; the trained weights must agree to the bit. Prints processor seconds, and adds a JSON line a pair to a file.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import (
    AutoModelForImageClassification,
    HfArgumentParser,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
)

from peft_ext import NolaConfig
from peft_ext.training.callbacks import trainable_state
from peft_ext.training.trainer import EvaluationTrainer, fit

from .lines import append, command, provenance


class Whole(EvaluationTrainer):
    """The baseline, which computes every block in every step."""

    prefix_memory = 0.0


@dataclass
class Arguments:
    """What is trained."""

    model_name_or_path: str = field(default="", metadata={"help": "An image classifier with twelve layers."})
    images: int = field(default=300, metadata={"help": "Images that are trained on."})
    image_size: int = field(default=56, metadata={"help": "Their width and height in pixels."})
    epochs: int = field(default=10, metadata={"help": "Passes over them."})
    pairs: int = field(default=3, metadata={"help": "How often both ways are timed."})
    output: str = field(default="", metadata={"help": "JSON lines that the figures are added to."})


def make(arguments: Arguments) -> Any:
    """A classifier of ten classes with its adapter."""
    torch.manual_seed(0)
    labels = {place: str(place) for place in range(10)}
    if arguments.model_name_or_path:
        model: Any = AutoModelForImageClassification.from_pretrained(
            arguments.model_name_or_path, id2label=labels, dtype=torch.float32
        )
    else:
        size: dict[str, Any] = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}
        model = ViTForImageClassification(
            ViTConfig(**size, id2label=labels, image_size=arguments.image_size, patch_size=14)
        )
    layers = list(range(8, 12))
    return get_peft_model(
        model, NolaConfig(r=8, num_basis=64, alpha=8, layers_to_transform=layers, modules_to_save=["classifier"])
    )


def train(arguments: Arguments, rows: list[Any], trainer: type[EvaluationTrainer]) -> tuple[float, dict[str, Any]]:
    """Processor seconds of a training, and what it leads to."""
    model = make(arguments)
    training = TrainingArguments(
        "unused", num_train_epochs=arguments.epochs, per_device_train_batch_size=20, learning_rate=3e-3, report_to=[]
    )
    start = time.process_time()
    fit(model, rows, default_data_collator, training, trainer)
    return time.process_time() - start, trainable_state(model)


def main() -> None:
    """Measures and prints."""
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    torch.manual_seed(0)
    shape = (3, arguments.image_size, arguments.image_size)
    rows = [{"pixel_values": torch.randn(shape), "labels": torch.tensor(i % 10)} for i in range(arguments.images)]
    table = Table("pair", "whole", "once a sample", "ratio", title="Seconds of a training")
    for pair in track(range(arguments.pairs), "Pairs", console=Console(stderr=True)):
        whole, expected = train(arguments, rows, Whole)
        once, found = train(arguments, rows, EvaluationTrainer)
        different = [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]
        if different:
            raise SystemExit(f"The trained {different[0]} is another one; it must be the same to the bit.")
        table.add_row(str(pair + 1), f"{whole:.1f}", f"{once:.1f}", f"{once / whole:.2f}")
        if arguments.output:
            seconds = {"whole_seconds": whole, "once_seconds": once, "ratio": once / whole}
            append(Path(arguments.output), {**seconds, **provenance(command("frozen_prefix", sys.argv[1:]))})
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
