"""Methods that train: from the trained weights on, or anew."""

from __future__ import annotations

import copy
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import ClassVar

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from ...checks import check_positive, check_positive_integer
from ...training.callbacks import trainable_parameters, trainable_state
from ..derivatives.data import Loader, check_sets
from .base import Request, Tuned, UnlearningMethod, UnlearningReport
from .rows import batch_size_of, rows_of

LEARNING_RATE = 1e-3
"""Learning rate of `fit` without `training`: customary for adapters."""


_NEEDED = {
    "reference": "the trainable parameters before the training (`trainable_state(model)` copies them)",
    "training": "the TrainingArguments of the training",
}


class TrainingMethod(UnlearningMethod):
    """A method that serves a request by a training."""

    needed: ClassVar[tuple[str, ...]] = ()
    """Those of `reference` and `training` that `fit` cannot do without."""

    @abstractmethod
    def train(self, request: Request) -> Trainer:
        """Trains the model of a request."""

    def facts(self, trainer: Trainer) -> Tuned:
        """Returns how the training went."""
        return Tuned(trainer.state.global_step, trainer.args.learning_rate)

    def unlearn(self, request: Request) -> UnlearningReport:
        start = time.perf_counter()
        before = trainable_state(request.model)
        with request.undone_on_failure():
            trainer = self.train(request)
            if not trainer.state.global_step:
                raise ValueError(
                    f"The training of {type(self).__name__} took no step, so nothing would be forgotten: the rows that "
                    "it reads fill no batch. Lower the batch size, or set `dataloader_drop_last` to False in the "
                    "training's arguments."
                )
        squared = sum(
            float((parameter.detach() - before[name].to(parameter.device)).double().square().sum())
            for name, parameter in trainable_parameters(request.model).items()
        )
        report = UnlearningReport(self.name, sum(map(torch.numel, before.values())), shift=squared**0.5)
        report.training = self.facts(trainer)
        report.seconds = time.perf_counter() - start
        return report

    def fit(
        self,
        model: nn.Module,
        retain: Loader,
        forget: Loader,
        *,
        reference: Mapping[str, torch.Tensor] | None = None,
        ridge: float = 0.0,
        training: TrainingArguments | None = None,
        eval_mode: bool | None = None,
    ) -> UnlearningReport:
        """Trains a model; see `UnlearningMethod.fit`.

        Args:
            model, reference, ridge: see `UnlearningMethod.fit`.
            retain, forget: best a `DataLoader` each, whose data set and collator the training takes; other batches are
                read once and cut into samples.
            training: the arguments that the model was trained with. By default the Trainer's own, with a learning rate
                of 1e-3, which is customary for adapters, batches as large as the first of `retain`, and the model's
                device.
            eval_mode: whether the model's training ran in evaluation mode; see `Request`, and for batch-norm `Retrain`.
                By default it did. `Retrain` and `Rewind` want it said of a model whose batch-norm statistics have moved
                at some time.

        Raises:
            ValueError: one of the sets is empty, they overlap, the model has nothing to train, what the method needs
                (`needed`) is missing, the training would take no step, or whether it moved batch-norm statistics is not
                known. The model is then as it was.
        """
        if any({"reference": reference, "training": training}[name] is None for name in self.needed):
            wanted = ", and ".join(f"`{name}`, {_NEEDED[name]}" for name in self.needed)
            raise ValueError(f"{type(self).__name__} needs {wanted}.")
        check_sets(retain, forget)
        (stays, goes), collator = rows_of(retain, forget)
        initial = trainable_state(model) if reference is None else reference
        with _training(training, model, retain) as arguments:
            mode = self.assumed_eval_mode(model) if eval_mode is None else eval_mode
            return self.unlearn(Request(model, stays, goes, collator, arguments, initial, ridge, mode))

    def assumed_eval_mode(self, model: nn.Module) -> bool:
        """Whether a model was trained in evaluation mode if nobody says so; a ValueError if that must be said."""
        return True


@contextmanager
def _training(training: TrainingArguments | None, model: nn.Module, loader: Loader) -> Iterator[TrainingArguments]:
    if training is not None:
        yield training
        return
    with TemporaryDirectory() as folder:
        yield TrainingArguments(
            output_dir=folder,
            learning_rate=LEARNING_RATE,
            per_device_train_batch_size=batch_size_of(loader),
            use_cpu=next(model.parameters()).device.type == "cpu",
            dataloader_pin_memory=False,
            report_to=[],
        )


def squeezed(training: TrainingArguments, share: float) -> TrainingArguments:
    """Returns the arguments of a training that goes through the same schedule, warm-up too, in a share of the steps."""
    training = copy.copy(training)
    training.num_train_epochs *= share
    if training.max_steps > 0:
        training.max_steps = max(1, round(share * training.max_steps))
    if training.warmup_steps >= 1:  # below 1 it is a share of the steps
        training.warmup_steps = round(share * training.warmup_steps)
    return training


@dataclass
class Tuning(TrainingMethod):
    """A method that goes on training the model, with other data or another loss.

    Schedule, optimizer and what else there is are those of the model's training, without warm-up and with the rows of
    an unfinished batch: the forget set may be smaller than one.

    Attributes:
        epochs: passes over the method's data.
        max_steps: optimizer steps, in place of epochs if positive.
        learning_rate: that of the model's training if None.
        batch_size: rows per device in a batch; that of the model's training if None.
    """

    epochs: float = 1.0
    max_steps: int = -1
    learning_rate: float | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.max_steps != -1:
            check_positive_integer("max_steps", self.max_steps)
        else:
            check_positive("epochs", self.epochs)
        if self.learning_rate is not None:
            check_positive("learning_rate", self.learning_rate)
        if self.batch_size is not None:
            check_positive_integer("batch_size", self.batch_size)

    def arguments(self, request: Request) -> TrainingArguments:
        """Returns the training's arguments with this method's in their place."""
        training = copy.copy(request.training)
        training.num_train_epochs = self.epochs
        training.max_steps = self.max_steps
        training.learning_rate = training.learning_rate if self.learning_rate is None else self.learning_rate
        training.per_device_train_batch_size = self.batch_size or training.per_device_train_batch_size
        training.warmup_steps = 0
        training.dataloader_drop_last = False
        return training

    @abstractmethod
    def data(self, request: Request) -> Dataset:
        """Returns what the model is trained on."""

    def train(self, request: Request) -> Trainer:
        return request.fit(self.data(request), self.arguments(request))
