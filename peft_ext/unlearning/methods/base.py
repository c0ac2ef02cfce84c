"""What every unlearning method gets and gives, and the training that most of them are."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy


class Ridge(TrainerCallback):
    """Adds the gradient of `strength / 2 * |parameters - reference|^2` to that of the loss, before every step.

    Unlike AdamW's weight decay it is part of what is minimised, and pulls to where the training began.

    Args:
        model: Its trainable parameters are pulled.
        reference: To where, by name.
        strength: How much.
    """

    def __init__(self, model: nn.Module, reference: Mapping[str, torch.Tensor], strength: float) -> None:
        self.strength = strength
        parameters = trainable_parameters(model) if strength else {}
        self.pairs = [(parameter, reference[name].clone()) for name, parameter in parameters.items()]

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add it."""
        for parameter, reference in self.pairs:
            if parameter.grad is not None:
                parameter.grad.add_(parameter - reference.to(parameter.device), alpha=self.strength)


class UnlearningTrainer(Trainer):
    """A Trainer that keeps the model in evaluation mode: no dropout, batch-norm statistics as they are.

    Gradient checkpointing rests in that mode, as transformers has it.
    """

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's loss; a method that descends another one overrides this."""
        model.eval()  # the Trainer has just put it in training mode
        return super().compute_loss(model, inputs, *args, **kwargs)


def fit(
    model: nn.Module,
    dataset: Any,
    collator: Callable[[list[Any]], Mapping[str, Any]],
    training: TrainingArguments,
    trainer_class: Callable[..., Trainer] = UnlearningTrainer,
    ridge: Ridge | None = None,
    **options: Any,
) -> Trainer:
    """Train a model on some rows, without a word, a file or an evaluation.

    Args:
        model: Changed in place.
        dataset: What it is trained on.
        collator: Makes a batch of rows.
        training: How. It is left as it is.
        trainer_class: What computes the loss.
        ridge: What pulls the parameters back.
        **options: What else the Trainer takes.

    Returns:
        The Trainer; its state says how many steps it took.
    """
    training = copy.copy(training)
    training.remove_unused_columns = False  # rows are as the collator takes them
    training.eval_strategy = training.logging_strategy = IntervalStrategy.NO
    training.save_strategy = SaveStrategy.NO
    training.load_best_model_at_end = False
    training.disable_tqdm = True
    trainer = trainer_class(model=model, args=training, train_dataset=dataset, data_collator=collator, **options)
    trainer.remove_callback(PrinterCallback)
    if ridge is not None and ridge.strength:
        trainer.add_callback(ridge)
    trainer.train()
    # Undo the autocast that Accelerate puts around the forward pass with bf16 or fp16: the model outlives this Trainer.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    model.eval()
    return trainer


@dataclass
class Request:
    """What is to be forgotten, from what.

    Attributes:
        model: Fine-tuned on retain and forget set together; changed in place.
        retain: The samples that stay. Map-style, with rows as the collator takes them.
        forget: The samples that go, of the same kind.
        collator: Makes a batch of rows, a mapping that the model is called with and that holds `labels`.
        training: As the model was trained: learning rate, batch size, epochs, seed...
        initial: The trainable parameters before that training, by name; `trainable_state` copies them. If the training
            moved buffers (batch-norm statistics), those too.
        ridge: Half of this times the squared distance from the initial parameters was added to the loss. Methods that
            go on training add it too.
        eval_mode: Whether that training ran in evaluation mode, without dropout and with batch-norm statistics kept, as
            `fit` does. Only `Retrain` asks: what the other methods do always runs in evaluation mode.

    Raises:
        ValueError: The model has nothing to train, a set is empty, the sets share samples, or `initial` does not fit.
    """

    model: nn.Module
    retain: Dataset
    forget: Dataset
    collator: Callable[[list[Any]], Mapping[str, Any]]
    training: TrainingArguments
    initial: dict[str, torch.Tensor]
    ridge: float = 0.0
    eval_mode: bool = True

    def __post_init__(self) -> None:
        parameters = trainable_parameters(self.model)
        if not parameters:
            raise ValueError("the model has no trainable parameters: none has requires_grad=True")
        for name in ("retain", "forget"):
            if _length(getattr(self, name)) == 0:
                raise ValueError(f"the {name} set is empty")
        shared = _shared_rows(self.retain, self.forget)
        if shared:
            raise ValueError(
                f"the retain and the forget set overlap: they share {shared} samples; a sample to forget must be taken "
                "out of the retain set"
            )
        missing = sorted(parameters.keys() - self.initial.keys())
        if missing:
            raise ValueError(
                f"initial lacks {len(missing)} trainable parameters, such as {missing[0]!r}; copy them with "
                "trainable_state(model) before the training"
            )
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for name, value in self.initial.items():
            if name not in tensors or tensors[name].shape != value.shape:
                found = f"has shape {tuple(tensors[name].shape)}" if name in tensors else "is not there"
                raise ValueError(f"initial holds {name!r} of shape {tuple(value.shape)}; in the model it {found}")

    def fit(
        self,
        dataset: Dataset,
        training: TrainingArguments,
        trainer_class: Callable[..., Trainer] = UnlearningTrainer,
        **options: Any,
    ) -> Trainer:
        """Train the model on some rows, pulled to its initial parameters; see `fit`."""
        ridge = Ridge(self.model, self.initial, self.ridge)
        return fit(self.model, dataset, self.collator, training, trainer_class, ridge, **options)

    def loader(self, dataset: Dataset, batch_size: int | None = None) -> DataLoader:
        """The rows of a set in order, in batches of a size; by default the training's."""
        return DataLoader(dataset, batch_size or self.training.train_batch_size, collate_fn=self.collator)

    def rng(self) -> np.random.Generator:
        """For what a method draws beside the training: the training's seed decides it."""
        return np.random.default_rng(self.training.seed)

    @torch.no_grad()
    def restore_initial(self) -> None:
        """Put the model back to what it was before the training."""
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for name, value in self.initial.items():
            # Not through `.data`: the adapters notice a change by the parameter's version.
            tensors[name].copy_(value)


class UnlearningMethod(ABC):
    """A way to make a model forget.

    A method is a dataclass: its fields are its options, each with a default. Adding one is one file with a subclass and
    a line in `METHODS`.
    """

    name: ClassVar[str]

    def prepare(self, request: Request) -> None:
        """Do what the method would have done at training time, before there was any request to forget.

        It is no part of the time that unlearning takes; by default there is nothing to do.
        """
        return None

    @abstractmethod
    def unlearn(self, request: Request) -> list[str]:
        """Change the model's trainable parameters, and nothing else of it.

        Returns:
            Notes on what was done, for a report.
        """


def _length(dataset: Any) -> int:
    return len(dataset)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters with `requires_grad`, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the trainable parameters, by name: the `initial` of a `Request` if taken before the training."""
    return {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}


def _shared_rows(first: Any, second: Any) -> int:
    """How many samples two sets share, as far as that shows without reading them.

    Equal rows are no overlap: data sets hold duplicates.
    """
    if isinstance(first, Subset) and isinstance(second, Subset) and first.dataset is second.dataset:
        return len(set(first.indices) & set(second.indices))
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len({id(row) for row in first} & {id(row) for row in second})
    return len(first) if first is second else 0


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
