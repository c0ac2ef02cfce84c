"""Which trainings there are, and a JSON line for each: a line that is there is not measured again."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from recipes.support.arguments import UserError, hint
from recipes.support.methods import HEAD, Method
from recipes.tasks.base import Task

from .. import lines
from .cifar10 import Cifar10
from .contestants import Contestant, choose
from .e2e import E2E
from .sst2 import Sst2
from .task import QualityTask, Sources
from .training import measure

TASKS: dict[str, type[QualityTask]] = {each.name: each for each in (Sst2, E2E, Cifar10)}
RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]


@dataclass
class RunArguments:
    """What is measured."""

    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": f"Of {', '.join(TASKS)}."})
    methods: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Labels of contestants, all by default, or YAML mappings as in '{name: nola, num_basis: 64, label: "
            "NOLA 64 bases}'; target_modules are the task's."
        },
    )
    rates: list[float] = field(default_factory=lambda: list(RATES), metadata={"help": "Learning rates."})
    steps: int | None = field(default=None, metadata={"help": "Steps of a training, in place of the task's."})
    output: str = field(default=str(lines.RESULTS), metadata={"help": "Folder of the files with the results."})


@dataclass(frozen=True)
class Run:
    """One training."""

    task: QualityTask
    method: Method
    rate: float
    seed: int

    @property
    def identity(self) -> dict[str, Any]:
        """What tells the run's line apart from others."""
        return {
            "task": self.task.name,
            "method": self.method.label,
            "config": config_digest(self.task.task, self.method),
            "rate": self.rate,
            "seed": self.seed,
            "budget": self.task.budget,
        }

    def line(self, known: Path, command: Sequence[str], dtypes: Sequence[str] = (), **facts: Any) -> dict[str, Any]:
        """Returns the run's line of a file, after measuring it if it is not there.

        Args:
            known: the file.
            command: what is run, for the line.
            dtypes: in which the adapter is saved and evaluated too.
            **facts: what else is to be in the line.
        """
        identity = self.identity
        # Read again before each run: another process may have measured it.
        if (row := lines.find(known, identity)) is not None:
            if any(row.get(name) != value for name, value in facts.items()):
                row |= facts  # measured before, and chosen anew: reports take the last choice
                lines.append(known, row)
            return row
        options = {name: value for name, value in self.method.options.items() if name != "target_modules"}
        found = measure(self.task, self.method, self.rate, self.seed, dtypes)
        row = {
            **identity,
            "name": self.method.name,
            "options": options,
            "metric": self.task.metric,
            **facts,
            **found,
            **lines.provenance(command),
        }
        lines.append(known, row)
        loss = "diverged in step {diverged_at}" if row["loss"] is None else "loss {loss:.4f}"
        text = "{task}, {method}, rate {rate:g}, seed {seed}: " + loss + ", {seconds:.0f} s"
        print(text.format(**row), file=sys.stderr, flush=True)
        return row


def config_digest(task: Task, method: Method) -> str:
    """Tells configurations apart, with the defaults of the options that are not given."""
    config: Any = method.config(task.task_type, 0, task.head)
    fields = asdict(config)
    if fields.get("factors_version", 0) is None:
        del fields["factors_version"]  # lines from before there was such a field are of the same configurations
    text = json.dumps(
        fields,
        sort_keys=True,
        default=lambda value: sorted(value) if isinstance(value, set) else str(value),
    )
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def title_of(line: dict[str, Any]) -> str:
    """Returns what tables and plots call the task and the budget of a line."""
    name, budget = TASKS[line["task"]].title if line["task"] in TASKS else line["task"], line["budget"]
    other = f", model and data {budget['source']}" if "source" in budget else ""
    return name + other + ", {steps} steps of {batch_size}, {train_rows} rows".format(**budget)


def load(args: RunArguments, sources: Sources) -> tuple[list[QualityTask], list[Contestant]]:
    """Returns the tasks and the contestants that were asked for.

    Raises:
        UserError: one of them does not exist, or a task lacks its model or data.
    """
    for name in args.tasks:
        if name not in TASKS:
            raise UserError(f"tasks: there is no {name!r}; there are {', '.join(TASKS)}{hint(name, TASKS)}")
    if any(rate <= 0 for rate in args.rates) or not args.rates:
        raise UserError(f"rates: they must be positive numbers, got {args.rates}")
    if args.steps is not None and args.steps < 1:
        raise UserError(f"steps is {args.steps}; it must be at least 1")
    tasks, contestants = [TASKS[name](sources, args.steps) for name in args.tasks], choose(args.methods)
    for task in tasks:
        _ = task.task  # what is missing shows before the first training
    return tasks, contestants


def grid(task: QualityTask, contestant: Contestant, rates: Iterable[float], seeds: Iterable[int]) -> list[Run]:
    """Returns the runs of a contestant on a task, all rates with the first seed first.

    There are none of the head alone on a task without a head.
    """
    if contestant.method == HEAD and not task.task.head:
        return []
    method = contestant.on(task)
    return [Run(task, method, rate, seed) for seed in seeds for rate in rates]
