"""Gradient ascent on the forget set (Thudi et al., "Unrolling SGD", 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer

from ...checks import check_positive
from ...training.trainer import EvaluationTrainer
from .base import Request, Tuned
from .relabelling import count_classes
from .tuning import Tuning


class AscentTrainer(EvaluationTrainer):
    """Ascends the loss until it reaches a bound.

    Args:
        max_loss: the bound.
        *args, **kwargs: what a Trainer takes.

    Attributes:
        reached: loss of the batches of the last step.
    """

    def __init__(self, max_loss: float, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.max_loss = max_loss
        self.reached = 0.0
        self._negative_loss: torch.Tensor | float = 0.0

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, *args, **kwargs)
        return (-loss, outputs) if return_outputs else -loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Takes a backward pass; the step is the last one if the loss of its batch has reached the bound."""
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
        learning_rate: a tenth of that of the model's training if None.
        max_loss: ascent stops after the step whose batch had this loss or more; if None, the loss of a guess among all
            classes (or tokens), the logarithm of their number.
    """

    name: ClassVar[str] = "gradient_ascent"
    epochs: float = 5.0
    max_loss: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_loss is not None:
            check_positive("max_loss", self.max_loss)

    def data(self, request: Request) -> Dataset:
        return request.forget

    def train(self, request: Request) -> Trainer:
        max_loss = math.log(count_classes(request)) if self.max_loss is None else self.max_loss
        training = self.arguments(request)
        training.learning_rate *= 1.0 if self.learning_rate is not None else 0.1
        return request.fit(self.data(request), training, partial(AscentTrainer, max_loss))

    def facts(self, trainer: Trainer) -> Tuned:
        assert isinstance(trainer, AscentTrainer)
        ended = "bound" if trainer.reached >= trainer.max_loss else "steps"
        return replace(super().facts(trainer), ended=ended, last_loss=trainer.reached)
