"""What every task has: a base model, data, a loss, scores, and adapters on the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import EvalResult
from peft import get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

from peft_ext.tuners.description import describe, is_described
from recipes.support import inputs
from recipes.support.arguments import UserError
from recipes.support.methods import Method
from recipes.support.reporting import RunResult


def adapt(
    fresh_model: Callable[[], nn.Module],
    method: Method,
    seed: int,
    head: Sequence[str] = (),
    task_type: str | None = None,
) -> nn.Module:
    """Returns a copy of a base model with a fresh adapter.

    Args:
        fresh_model: makes the copy. It is called after the seed is set, since a new head is drawn with it.
        method: what is put on it.
        seed: the run's seed.
        head: modules to train and save whole beside the adapter.
        task_type: PEFT's task type.

    Raises:
        UserError: the method does not fit the model.
    """
    set_seed(seed)
    config, model = method.config(task_type, seed, head), fresh_model()
    names = {name.rpartition(".")[-1] for name, module in model.named_modules() if hasattr(module, "weight")}
    try:
        return get_peft_model(model, config)  # type: ignore[arg-type]
    except NoMatchingPeftModuleError as error:
        targets = method.options.get("target_modules", "of its own")
        raise UserError(
            f"method {method.label!r}: target_modules {targets} names nothing that it can adapt; the model has "
            f"{', '.join(sorted(names))}"
        ) from error
    except (TypeError, ValueError) as error:
        raise UserError(f"method {method.label!r}: {error}") from error


@dataclass
class Task(ABC):
    """What is trained on what; the same for all methods.

    Attributes:
        source: how the base model is loaded.
        processor: what turns data into the model's inputs: a tokenizer or an image processor.
        training: the Trainer's arguments.
        task_type: PEFT's task type.
        hub_task: the hub's name of the task, for cards.
        loss: which of the values of the Trainer's evaluation is the validation loss.
        weights_file: the file that `save` writes the weights to.
    """

    source: inputs.ModelArguments
    processor: Any
    training: TrainingArguments

    task_type: ClassVar[str | None] = None
    hub_task: ClassVar[str]
    loss: ClassVar[str] = "eval_loss"
    weights_file: ClassVar[str] = "adapter_model.safetensors"

    @property
    @abstractmethod
    def dataset(self) -> str:
        """What the data is called in cards."""

    @property
    def head(self) -> Sequence[str]:
        """The modules that are trained and saved whole beside every adapter."""
        return ()

    @abstractmethod
    def fresh_model(self) -> nn.Module:
        """Returns a copy of the base model."""

    def adapt(self, method: Method, seed: int) -> nn.Module:
        """Returns a copy of the base model with a fresh adapter."""
        return adapt(self.fresh_model, method, seed, self.head, self.task_type)

    @property
    def trainer(self) -> Callable[..., Trainer]:
        """What makes a Trainer: the class, perhaps with arguments of its own."""
        return Trainer

    @abstractmethod
    def trainer_arguments(self, model: nn.Module) -> dict[str, Any]:
        """Returns data sets, collator and metrics for the Trainer of a model."""

    @abstractmethod
    def score(self, model: Any, evaluation: Mapping[str, float], result: RunResult) -> None:
        """Fills in a result's outputs and, in the main process at least, its metrics.

        Args:
            model: what is scored.
            evaluation: what the Trainer's evaluation of it gave.
            result: what is filled in.
        """

    def save(self, model: Any, folder: Path) -> None:
        """Saves what was trained, and what else it takes to use it."""
        model.save_pretrained(str(folder))

    def describe(self, folder: Path, result: RunResult) -> None:
        """Adds data and results to the model card of what was saved, if it is ours."""
        scores = {"loss": result.validation_loss, **result.metrics}
        metrics = [
            EvalResult(self.hub_task, self.dataset, self.dataset, metric_type=name, metric_value=round(value, 4))
            for name, value in scores.items()
            if value is not None
        ]
        if is_described(folder):
            describe(folder, datasets=[self.dataset], metrics=metrics)

    @abstractmethod
    def probes(self) -> list[dict[str, torch.Tensor]]:
        """Returns examples on which a loaded adapter is compared with the trained one."""
