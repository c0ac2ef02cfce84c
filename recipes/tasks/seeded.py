"""Training whole networks that are a seed and a few coefficients on images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import save_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, set_seed

from peft_ext import SeededNetwork
from recipes.support import inputs
from recipes.support.arguments import UserError
from recipes.support.methods import Method
from recipes.support.reporting import RunResult
from recipes.tasks.base import Task
from recipes.tasks.classification import accuracy, likeliest
from recipes.tasks.image_classification import ImageData
from recipes.tasks.resnet import CifarResNet

FULL = "full"
"""The method that trains all weights."""


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


def check_network(args: NetworkArguments) -> None:
    """Raises a UserError for images that cannot be cut up."""
    inputs.check_counts(args, "image_size")
    if args.network == "vit" and args.image_size % 4:
        raise UserError(
            f"image_size is {args.image_size}; the ViT cuts images into 4 by 4 patches: give a multiple of 4"
        )


@dataclass
class SeedTask(Task):
    """Training whole networks on images.

    Attributes:
        data: what they are trained and evaluated on.
        arguments: which network it is.
    """

    data: ImageData
    arguments: NetworkArguments

    hub_task = "image-classification"
    weights_file: ClassVar[str] = "model.safetensors"

    @property
    def dataset(self) -> str:
        return inputs.dataset_title(self.data.args)

    def fresh_model(self) -> nn.Module:
        """Returns the network, with random weights of torch's."""
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
        """Returns the network made from a seed, or as it is for the method that trains all weights."""
        set_seed(seed)
        network = self.fresh_model()
        if method.name == FULL:
            return network
        try:
            config = method.config(None, seed)
            return SeededNetwork(network, config, self.arguments.keep_basis)  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(f"method {method.label!r}: {error}") from error

    def trainer_arguments(self, model: nn.Module) -> dict[str, Any]:
        return {
            "train_dataset": self.data.encoded(self.data.train, self.processor),
            "eval_dataset": self.data.encoded(self.data.validation, self.processor),
            "compute_metrics": accuracy,
            "preprocess_logits_for_metrics": likeliest,
        }

    def score(self, model: nn.Module, evaluation: Mapping[str, float], result: RunResult) -> None:
        result.metrics = {"accuracy": evaluation["eval_accuracy"]}

    def save(self, model: nn.Module, folder: Path) -> None:
        """Saves seed and coefficients, or all weights."""
        if isinstance(model, SeededNetwork):
            model.save_pretrained(folder)
        else:
            folder.mkdir(exist_ok=True)
            save_model(model, str(folder / self.weights_file))

    def probes(self) -> list[dict[str, torch.Tensor]]:
        """Returns none: the recipe compares nothing, tests rebuild what was trained."""
        return []
