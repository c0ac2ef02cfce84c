"""Methods that go on training the model."""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import dataclass

from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from .base import Request, UnlearningMethod


@dataclass
class Tuning(UnlearningMethod):
    """A method that goes on training the model, with other data or another loss.

    Attributes:
        epochs: Passes over the method's data.
        max_steps: Optimizer steps, in place of epochs if positive.
        learning_rate: That of the model's training if None.
        batch_size: Rows per device in a batch; that of the model's training if None.

    Schedule, optimizer and what else there is are those of the model's training, without warm-up.
    """

    epochs: float = 1.0
    max_steps: int = -1
    learning_rate: float | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.epochs <= 0 and self.max_steps <= 0:
            raise ValueError(f"{self.name}: epochs is {self.epochs}; it must be positive, or max_steps must be")
        for name in ("learning_rate", "batch_size"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{self.name}: {name} is {value}; it must be positive")

    def arguments(self, request: Request) -> TrainingArguments:
        """The training's arguments with this method's in their place."""
        training = copy.copy(request.training)
        training.num_train_epochs = self.epochs
        training.max_steps = self.max_steps
        training.learning_rate = training.learning_rate if self.learning_rate is None else self.learning_rate
        training.per_device_train_batch_size = self.batch_size or training.per_device_train_batch_size
        training.warmup_steps = 0
        return training

    @abstractmethod
    def data(self, request: Request) -> Dataset:
        """What the model is trained on."""

    def train(self, request: Request) -> Trainer:
        """Train; a method with another loss overrides this to name its Trainer."""
        return request.fit(self.data(request), self.arguments(request))

    def unlearn(self, request: Request) -> list[str]:
        """Train and say for how long."""
        trainer = self.train(request)
        return [f"{trainer.state.global_step} steps, learning rate {trainer.args.learning_rate:g}"]
