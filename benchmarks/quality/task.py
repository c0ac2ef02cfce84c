"""What a task is to the contestants: a base model, rows, a collator, targets and a budget that are the same for all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from transformers import TrainingArguments

from recipes.support.arguments import UserError
from recipes.tasks.base import Task

from ..sources import source_entry, source_of


@dataclass
class Sources:
    """Where models and data are: folders, or names on the hub."""

    sst2_model: str | None = field(default=None, metadata={"help": "all-MiniLM-L6-v2, for the task sst2."})
    sst2_data: str | None = field(
        default=None, metadata={"help": "SST-2, with splits train and validation and columns sentence and label."}
    )
    e2e_model: str | None = field(default=None, metadata={"help": "SmolLM2-135M, for the task e2e."})
    e2e_gguf: str | None = field(default=None, metadata={"help": "The GGUF file in that folder, if it has one."})
    e2e_data: str | None = field(
        default=None, metadata={"help": "E2E, with splits train and validation and columns mr and ref."}
    )
    cifar10_model: str | None = field(default=None, metadata={"help": "DINOv2 ViT-S, for the task cifar10."})
    cifar10_data: str | None = field(
        default=None, metadata={"help": "CIFAR-10, with splits train and test and columns image and label."}
    )

    def need(self, name: str) -> str:
        """Returns a source that must be given."""
        value = getattr(self, name)
        if value is None:
            raise UserError(f"the task {name.partition('_')[0]} needs --{name}: {type(self).help_of(name)}")
        return str(value)

    @classmethod
    def help_of(cls, name: str) -> str:
        """Returns what the command line says of a source."""
        return str(cls.__dataclass_fields__[name].metadata["help"])


class QualityTask(ABC):
    """One task. A subclass names its sizes and says how model and data are loaded.

    Attributes:
        name: of the task on the command line and in results.
        title: base model and data.
        targets: the layers that are adapted.
        steps, batch_size: how long every contestant trains.
        eval_batch_size: rows of a batch of the evaluation.
        sampling: the Trainer's strategy: texts of like length together have little padding.
        metric: the score beside the loss, if there is one; higher is better.
        known_source: the `source` of the lines that do not say theirs.
        schedule: warm-up steps, the head's own learning rate and the clipping of gradients; the head's rate does not
            follow the searched one, so that a curve over rates shows the adapter alone.

    Args:
        sources: where model and data are.
        steps: fewer or more steps than the task has.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    targets: ClassVar[tuple[str, ...]]
    steps: int
    batch_size: ClassVar[int]
    eval_batch_size: ClassVar[int] = 48
    sampling: ClassVar[str] = "random"
    metric: ClassVar[str | None] = None
    known_source: ClassVar[str | None] = None
    warmup_steps: ClassVar[int] = 10
    head_rate: ClassVar[float] = 1e-3
    max_grad_norm: ClassVar[float] = 1.0

    def __init__(self, sources: Sources, steps: int | None = None) -> None:
        self.sources = sources
        self.steps = steps or self.steps

    @abstractmethod
    def load(self, training: TrainingArguments) -> Task:
        """Loads model and data."""

    @cached_property
    def training(self) -> TrainingArguments:
        """The Trainer's arguments, but for seed and learning rate."""
        return TrainingArguments(
            max_steps=self.steps,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=self.eval_batch_size,
            warmup_steps=self.warmup_steps,
            max_grad_norm=self.max_grad_norm,
            train_sampling_strategy=self.sampling,
            lr_scheduler_type="linear",
            weight_decay=0.0,
            remove_unused_columns=False,
            label_names=["labels"],  # PEFT's wrapper hides them from the Trainer
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )

    @cached_property
    def task(self) -> Task:
        """The loaded task."""
        return self.load(self.training)

    @cached_property
    def source(self) -> str:
        """Tells base model and data from others, by the rows that are drawn when it is first asked for."""
        return source_of(self.task)

    @cached_property
    def _rows(self) -> dict[str, list[Any]]:
        found = self.task.trainer_arguments(self.task.fresh_model())
        # Read once: images are decoded, and texts encoded, when they are read.
        return {name: list(found[name]) for name in ("train_dataset", "eval_dataset")}

    def trainer_arguments(self, model: Any) -> dict[str, Any]:
        """Returns rows, collator and metrics for the Trainer of a model."""
        return {**self.task.trainer_arguments(model), **self._rows}

    @property
    def budget(self) -> dict[str, Any]:
        """What every contestant has, model and data among it: part of what tells results apart."""
        sizes = {name.removesuffix("_dataset") + "_rows": len(rows) for name, rows in self._rows.items()}
        names = ("steps", "batch_size", "sampling", "warmup_steps", "head_rate", "max_grad_norm")
        return {
            **{name: getattr(self, name) for name in names},
            **sizes,
            **source_entry(self.source, self.known_source),
        }

    @cached_property
    def shapes(self) -> list[tuple[int, int]]:
        """Outputs and inputs of every adapted layer."""
        return [
            tuple(module.weight.shape)
            for name, module in self.task.fresh_model().named_modules()
            if name.rpartition(".")[-1] in self.targets
        ]
