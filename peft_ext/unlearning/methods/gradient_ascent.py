"""Gradient ascent on the forget set (Thudi et al., "Unrolling SGD", 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer

from ...training.trainer import EvaluationTrainer
from .base import Request
from .relabelling import count_classes
from .tuning import Tuning


class AscentTrainer(EvaluationTrainer):
    """Ascends the loss until it reaches a bound.

    Args:
        max_loss: The bound.
        *args: The Trainer's.
        **kwargs: The Trainer's.
    """

    def __init__(self, max_loss: float, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.max_loss = max_loss
        self.reached = 0.0
        self._negative_loss: torch.Tensor | float = 0.0

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """The model's loss, negated."""
        loss, outputs = super().compute_loss(model, inputs, True, *args, **kwargs)
        return (-loss, outputs) if return_outputs else -loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A backward pass; the step is the last one if the loss of its batch has reached the bound."""
        negative_loss = super().training_step(*args, **kwargs)
        self._negative_loss = self._negative_loss + negative_loss
        if self.accelerator.sync_gradients:
            # All processes must stop together.
            self.reached = -float(self.accelerator.reduce(self._negative_loss, "mean"))
            self._negative_loss = 0.0
            if self.reached >= self.max_loss:
                self.control.should_training_stop = True
        return negative_loss


@dataclass
class GradientAscent(Tuning):
    """Ascends the loss of the forget set. Without a bound it would ruin the model.

    Attributes:
        learning_rate: A tenth of that of the model's training if None.
        max_loss: Stops after the step whose batch had this loss or more; if None, the loss of a guess among all
            classes (or tokens), the logarithm of their number.
    """

    name: ClassVar[str] = "gradient_ascent"
    epochs: float = 5.0
    max_loss: float | None = None

    def data(self, request: Request) -> Dataset:
        """The forget set."""
        return request.forget

    def train(self, request: Request) -> Trainer:
        """Ascend."""
        max_loss = math.log(count_classes(request)) if self.max_loss is None else self.max_loss
        training = self.arguments(request)
        training.learning_rate *= 1.0 if self.learning_rate is not None else 0.1
        return request.fit(self.data(request), training, partial(AscentTrainer, max_loss))

    def unlearn(self, request: Request) -> list[str]:
        """Ascend, and say whether the bound ended it."""
        trainer = self.train(request)
        assert isinstance(trainer, AscentTrainer)
        ended = "the bound" if trainer.reached >= trainer.max_loss else "the last step"
        return [
            f"{trainer.state.global_step} steps, learning rate {trainer.args.learning_rate:g}; ended by "
            f"{ended}, batch loss {trainer.reached:.2f}"
        ]
