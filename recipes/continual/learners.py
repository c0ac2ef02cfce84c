"""How tasks are learned in turn: learners as a user names them, and what each does."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from transformers import TrainingArguments

from peft_ext.adapters.continual import TaskMemory
from peft_ext.adapters.winners import KWinners
from peft_ext.training.callbacks import trainable_parameters
from peft_ext.training.trainer import fit
from peft_ext.unlearning.evaluation.metrics import observe
from recipes.continual.problems import Problem
from recipes.continual.results import TurnResult
from recipes.support.arguments import UserError
from recipes.support.methods import parse_specs
from recipes.support.usage import Usage

_MEMORY = {f.name for f in dataclasses.fields(TaskMemory) if f.init}
_KINDS: dict[str, set[str]] = {
    "finetune": {"dropout"},
    "ewc": {"elastic", "dropout"},
    "projection": {"energy", "components", "temperature", "dropout"},
    "separate": set(),
    "together": set(),
}
_DEFAULTS: dict[str, dict[str, float]] = {"ewc": {"elastic": 1000.0}, "projection": {"energy": 0.99}}


@dataclass
class LearnerArguments:
    """What is trained, and the learners that are compared."""

    adapter: str = field(
        default="nola",
        metadata={
            "help": "The PEFT method that is trained, beside the head of a classifier: a name or a YAML mapping of "
            "name and options, as --methods of the other recipes; for a Swiss roll the one that makes the network."
        },
    )
    learners: list[str] = field(
        default_factory=lambda: list(_KINDS),
        metadata={
            "help": "One adapter for all tasks, one after the other: 'finetune', 'ewc' (option elastic, the strength), "
            "'projection' (energy, components, temperature), each with dropout, as in "
            "peft_ext.adapters.continual.TaskMemory; 'separate', one adapter a task; 'together', all tasks at once. "
            "All take winners, the units that stay on in every layer, and a 'label': "
            "'{name: projection, winners: 2, label: projection and k-winners}'."
        },
    )
    memory_samples: int = field(
        default=300, metadata={"help": "At most as many samples of a task are used to remember it."}
    )


@dataclass(frozen=True)
class Learner:
    """A way to learn tasks.

    Attributes:
        label: what it is called in tables.
        kind: one of the names of `LearnerArguments.learners`.
        memory: options of the `TaskMemory`.
        winners: how many units of a layer stay on; None for all.
    """

    label: str
    kind: str
    memory: dict[str, Any]
    winners: int | None


def parse_learners(texts: Sequence[str]) -> dict[str, Learner]:
    """Reads ``--learners``: the learners by the names of their folders."""
    found = {}
    for spec in parse_specs(texts, {name: {*options, "winners"} for name, options in _KINDS.items()}, "learners"):
        options = {**_DEFAULTS.get(spec.name, {}), **spec.options}
        winners = options.pop("winners", None)
        try:
            TaskMemory(**options)
        except (TypeError, ValueError) as error:
            raise UserError(f"learner {spec.label!r}: {error}") from error
        found[spec.folder] = Learner(spec.label, spec.name, options, winners)
    return found


@dataclass
class Turns:
    """Trains and measures learners on a problem.

    Attributes:
        problem: the tasks.
        training: the Trainer's arguments, for each task.
        memory_samples: at most as many samples of a task are remembered by.
    """

    problem: Problem
    training: TrainingArguments
    memory_samples: int

    def model(self, learner: Learner, seed: int, stack: ExitStack) -> nn.Module:
        """Returns a fresh model on the device, with k-winners until the stack is left if the learner has them."""
        model = self.problem.fresh(seed)
        if learner.winners is not None:
            try:
                stack.enter_context(KWinners(model, learner.winners, self.problem.hidden))
            except ValueError as error:
                raise UserError(f"learner {learner.label!r}: {error}") from error
        return model.to(self.training.device)

    def try_out(self, learner: Learner, seed: int) -> None:
        """Raises a UserError for what does not fit the model."""
        with ExitStack() as stack:
            model = self.model(learner, seed, stack)
            size = sum(parameter.numel() for parameter in trainable_parameters(model).values())
            components, tasks = learner.memory.get("components"), len(self.problem.names)
            if components is not None and components * (tasks - 1) >= size:
                raise UserError(
                    f"learner {learner.label!r}: {components} components of each of the {tasks - 1} tasks before the "
                    f"last are not less than the {size:,} numbers that are trained; lower components"
                )
            row = self.problem.collator([self.problem.train[0][0]])
            try:
                with torch.no_grad():
                    model.eval()(**send_to_device(row, self.training.device))
            except ValueError as error:
                raise UserError(f"learner {learner.label!r}: {error}") from error

    def loader(self, rows: Any, size: int) -> Any:
        """Returns a loader of rows in order; in several processes each reads a share."""
        loader = DataLoader(rows, size, collate_fn=self.problem.collator)
        return Accelerator().prepare_data_loader(loader) if PartialState().num_processes > 1 else loader

    def accuracies(self, model: nn.Module, tasks: Sequence[int]) -> list[float | None]:
        """Returns the accuracy in percent on each task's test set, None for those that are not asked for."""
        size = self.training.per_device_eval_batch_size
        return [
            100 * float(observe(model, self.loader(rows, size)).correct.mean()) if task in tasks else None
            for task, rows in enumerate(self.problem.test)
        ]

    def run(self, learner: Learner, seed: int, folder: Path) -> TurnResult:
        """Learns all tasks with one learner, and measures after each of them; prints a line.

        Args:
            learner: how.
            seed: the run's seed.
            folder: not used; all runs of a recipe have one.
        """
        training = copy.copy(self.training)
        training.seed = seed
        result = TurnResult(learner.label, seed, self.problem.names)
        every = range(len(self.problem.names))
        with ExitStack() as stack, Usage(self.training.device) as usage:
            model = self.model(learner, seed, stack)
            result.parameters = sum(parameter.numel() for parameter in trainable_parameters(model).values())
            if learner.kind == "together":
                if training.max_steps > 0:  # which are those of a task
                    training.max_steps *= len(every)
                fit(model, ConcatDataset(self.problem.train), self.problem.collator, training)
                result.accuracy = [self.accuracies(model, []) for _ in every[:-1]] + [self.accuracies(model, every)]
            elif learner.kind == "separate":
                found: list[float | None] = [None for _ in every]
                for task in every:
                    if task:
                        model = self.model(learner, seed, stack)
                    fit(model, self.problem.train[task], self.problem.collator, training)
                    found[task] = self.accuracies(model, [task])[task]
                    result.accuracy.append(list(found))
            else:
                self._in_turn(model, learner, training, result)
        result.seconds = usage.seconds
        PartialState().print(result.line(), flush=True)
        return result

    def learn(
        self,
        model: nn.Module,
        learner: Learner,
        memory: TaskMemory,
        task: int,
        training: TrainingArguments,
        rows: Dataset | None = None,
    ) -> list[float | None]:
        """Learns a task after those before it, and returns the accuracies in percent on all that are learned.

        Args:
            model: as the tasks before have left it; changed in place.
            learner: how.
            memory: what the learner keeps of the tasks before. It takes this one in, unless that is the last.
            task: its number.
            training: the Trainer's arguments, with the run's seed.
            rows: what it is learned from; by default the task's own training rows.
        """
        rows = self.problem.train[task] if rows is None else rows
        fit(model, rows, self.problem.collator, training, callbacks=memory.callbacks(model, training.seed))
        if task < len(self.problem.names) - 1:
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(training.seed)).tolist()  # type: ignore[arg-type]
            chosen = Subset(rows, order[: self.memory_samples])
            try:
                memory.remember(model, self.loader(chosen, training.per_device_eval_batch_size))
            except ValueError as error:
                raise UserError(f"learner {learner.label!r}, {self.problem.names[task]}: {error}") from error
        return self.accuracies(model, range(task + 1))

    def _in_turn(self, model: nn.Module, learner: Learner, training: TrainingArguments, result: TurnResult) -> None:
        memory = TaskMemory(**learner.memory)
        for task in range(len(self.problem.names)):
            result.accuracy.append(self.learn(model, learner, memory, task, training))
            result.protected.append(0 if memory.projection is None else memory.projection.basis.shape[1])
