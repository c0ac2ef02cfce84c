"""What every unlearning method gets and gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import Trainer, TrainingArguments

from ...training.callbacks import Ridge, trainable_parameters
from ...training.trainer import EvaluationTrainer, fit


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
        trainer_class: Callable[..., Trainer] = EvaluationTrainer,
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


def _shared_rows(first: Any, second: Any) -> int:
    """How many samples two sets share, as far as that shows without reading them.

    Equal rows are no overlap: data sets hold duplicates.
    """
    if isinstance(first, Subset) and isinstance(second, Subset) and first.dataset is second.dataset:
        return len(set(first.indices) & set(second.indices))
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len({id(row) for row in first} & {id(row) for row in second})
    return len(first) if first is second else 0
