"""Train an image classifier that is a seed and a few coefficients, without base weights: PRANC and MCNC as published.

``python -m recipes.train_from_seed --preset resnet20_cifar10 --dataset_name <folder>``; ``--help`` lists the arguments.
Without any, a small ViT learns scikit-learn's digits. It runs under ``accelerate launch -m`` unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import datasets
import torch
from accelerate import PartialState
from safetensors.torch import save_model
from torch import nn
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification, ViTImageProcessorPil, set_seed

from peft_ext import SeededNetwork
from recipes.support import inputs
from recipes.support.arguments import (
    Method,
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
from recipes.tasks.image_classification import DataArguments, ImageData, accuracy, likeliest, load_image_data
from recipes.tasks.resnet import CifarResNet
from recipes.tasks.training import Task, run_all, set_up, train

FULL = "full"  # the method that trains all weights


@dataclass
class NetworkArguments:
    """What is trained."""

    network: Literal["resnet20", "vit"] = field(
        default="vit",
        metadata={
            "help": "ResNet-20 for CIFAR, or a ViT of 4 layers of width 64 that cuts images into 4 by 4 patches."
        },
    )
    image_size: int = field(default=32, metadata={"help": "Height and width in pixels that images are brought to."})
    keep_basis: bool = field(
        default=False,
        metadata={"help": "Keep PRANC's dense basis in memory instead of drawing it again twice a step."},
    )
    digits: bool = field(
        default=False, metadata={"help": "Train on scikit-learn's digits, in place of --dataset_name."}
    )


@dataclass
class SeedTask(Task):
    """Training whole networks on images."""

    data: ImageData
    arguments: NetworkArguments

    weights_file: ClassVar[str] = "model.safetensors"

    def fresh_model(self) -> nn.Module:
        """The network, with random weights of torch's."""
        if self.arguments.network == "resnet20":
            return CifarResNet(num_labels=len(self.data.labels))
        size = self.arguments.image_size
        config = ViTConfig(
            image_size=size,
            patch_size=size // 4,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            id2label=dict(enumerate(self.data.labels)),
            label2id={label: number for number, label in enumerate(self.data.labels)},
        )
        return ViTForImageClassification(config)

    def adapt(self, method: Method, seed: int) -> nn.Module:
        """The network made from a seed, or as it is for the method that trains all weights."""
        set_seed(seed)
        network = self.fresh_model()
        if method.name == FULL:
            return network
        try:
            config = method.config(None, seed)
            return SeededNetwork(network, config, self.arguments.keep_basis)  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(f"method {method.label!r}: {error}") from error

    def images(self, split: datasets.Dataset) -> datasets.Dataset:
        """A split as the network's inputs."""
        return self.data.encoded(split, self.processor)

    def trainer_arguments(self) -> dict[str, Any]:
        """Data sets and metric for the Trainer."""
        return {
            "train_dataset": self.images(self.data.train),
            "eval_dataset": self.images(self.data.validation),
            "compute_metrics": accuracy,
            "preprocess_logits_for_metrics": likeliest,
        }

    def score(self, model: nn.Module, evaluation: Mapping[str, float], result: RunResult) -> None:
        """Keep the accuracy."""
        result.metrics = {"accuracy": evaluation["eval_accuracy"]}

    def save(self, model: nn.Module, folder: Path) -> None:
        """Seed and coefficients, or all weights."""
        if isinstance(model, SeededNetwork):
            model.save_pretrained(folder)
        else:
            folder.mkdir(exist_ok=True)
            save_model(model, str(folder / self.weights_file))

    def probes(self) -> list[dict[str, torch.Tensor]]:
        """None: tests compare what is rebuilt with what was trained."""
        return []


def main(argv: Sequence[str]) -> None:
    """Run the recipe."""
    arguments = parse_arguments(
        "train_from_seed", [NetworkArguments, DataArguments, MethodArguments, TrainingArguments], argv
    )
    network_args, data_args, method_args, training = arguments
    methods = parse_methods(method_args.methods, extra=[FULL])
    seeds = method_args.seeds or [training.seed]
    set_up(training)
    training.remove_unused_columns = False  # images become pixel values when they are read
    is_main = PartialState().is_main_process
    if network_args.digits and data_args.dataset_name:
        raise UserError("digits makes its own data: leave out --dataset_name")
    if data_args.shots is not None or method_args.verify_adapters:
        raise UserError("--shots and --verify_adapters are for adapters")
    record = check_output_dir(training, arguments, method_args.overwrite_output_dir)
    PartialState().wait_for_everyone()  # no process may write before all have looked
    output_dir = Path(training.output_dir)

    if network_args.digits:
        data_args.dataset_name = digits.prepare_data(output_dir)
    size = {"height": network_args.image_size, "width": network_args.image_size}
    processor = ViTImageProcessorPil(size=size)
    with PartialState().main_process_first():
        data = load_image_data(data_args)
    task = SeedTask(inputs.ModelArguments(), processor, training, data, network_args)
    for method in methods:
        task.adapt(method, seeds[0])  # whether it fits the network shows here, before hours of training
    if is_main:
        claim_output_dir(training, record)
    PartialState().wait_for_everyone()

    runs: dict[str, Callable[[Path], RunResult]] = {
        f"{method.folder}-seed{seed}": partial(train, task, method, seed, False) for method in methods for seed in seeds
    }
    results = run_all(training, runs)
    if is_main:
        plots = {
            "loss.png": partial(plot_losses, results, unit="image"),
            "accuracy.png": partial(plot_metric, results, name="accuracy"),
        }
        sizes = f"{len(data.train):,} training, {len(data.validation):,} validation images"
        notes = f"{len(seeds)} seed(s) a method; {sizes}.\n"
        write_report(results, output_dir, notes, plots)


if __name__ == "__main__":
    run_main(main)
