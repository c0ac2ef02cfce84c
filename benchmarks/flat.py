"""Flat training against plain training, in pairs: loss, score, loss under fresh noise, and time.

    python -m benchmarks run flat --tasks cifar10 --rates 1e-3 --cifar10_model <folder> --cifar10_data <folder>
    python -m benchmarks report flat

The trainings of a pair have the same rows, start and order, and differ in the size of the noise alone; one has none.
Another pair has another start and order, and where a task takes a few images of every class, others of those. Each is
evaluated without noise and under draws of noise that no training has seen. Adds a line a training to `flat.jsonl`; a
training whose line is there is not done again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from rich.table import Table
from transformers import HfArgumentParser

from peft_ext.presentation import spread
from peft_ext.training.flat import FlatTraining, perturbed
from recipes.support.arguments import UserError, run_main

from . import lines
from .quality.contestants import Contestant
from .quality.runs import TASKS, Run, RunArguments, load, title_of
from .quality.summary import Row, by, by_budget, latest
from .quality.task import QualityTask, Sources
from .quality.training import evaluated, trained

FILE = "flat.jsonl"
_FRESH = 2**32  # seed of the noise in evaluations, which is no pair's


@dataclass
class Arguments(RunArguments):
    """What is measured."""

    tasks: list[str] = field(default_factory=lambda: ["cifar10"], metadata={"help": f"Of {', '.join(TASKS)}."})
    methods: list[str] = field(
        default_factory=lambda: ["NOLA 2304"], metadata={"help": "As for the benchmark learning_rates."}
    )
    rates: list[float] = field(default_factory=lambda: [1e-3], metadata={"help": "Learning rates."})
    sigmas: list[float] = field(default_factory=lambda: [0.05, 0.2], metadata={"help": "Sizes of the noise."})
    pairs: int = field(
        default=6, metadata={"help": "How often everything is trained, with another start and order each time."}
    )
    draws: int = field(default=3, metadata={"help": "Draws of fresh noise of each size in an evaluation."})


def measure(task: QualityTask, run: Run, sigma: float, sigmas: Sequence[float], draws: int) -> dict[str, Any]:
    """Trains once, and evaluates without noise and under fresh noise of all sizes."""
    with FlatTraining(sigma, run.seed) if sigma else nullcontext() as flat:
        options: dict[str, Any] = {"callbacks": [flat]} if flat else {}
        model, found = trained(task, run.method, run.rate, run.seed, **options)
    found |= {**evaluated(task, model), "noise": []}
    for size in sigmas:
        noisy = []
        for draw in range(draws):
            with perturbed(model, size, _FRESH, draw):
                noisy.append(evaluated(task, model))
        means = {name: _mean([each[name] for each in noisy]) for name in ("loss", "score")}
        found["noise"].append({"sigma": size, **means})
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(mean(known), 5) if known and len(known) == len(values) else None


def measure_pair(args: Arguments, sources: Sources, task: str, who: Contestant, pair: int, command: list[str]) -> None:
    """Adds the lines of one pair that are not in the file yet."""
    known, chosen = Path(args.output) / FILE, TASKS[task](sources, args.steps)
    inner: Any = chosen.task
    _ = chosen.source  # of what the task itself draws: which images a pair has is said by its seed
    inner.data_seed = pair  # draws the images of a few-shot task
    for rate in args.rates:
        for sigma in (0.0, *args.sigmas):
            run = Run(chosen, who.on(chosen), rate, pair)
            identity = {**run.identity, "sigma": sigma, "sigmas": args.sigmas, "draws": args.draws}
            if lines.find(known, identity) is not None:
                continue
            row = {**identity, "metric": chosen.metric, **measure(chosen, run, sigma, args.sigmas, args.draws)}
            lines.append(known, {**row, **lines.provenance(command)})
            text = "{task}, {method}, rate {rate:g}, pair {seed}, sigma {sigma:g}: loss {loss}, {seconds:.0f} s"
            print(text.format(**row), file=sys.stderr, flush=True)


def tables(rows: Sequence[Row]) -> list[Table]:
    """Returns a table of differences between the trainings of a pair, flat minus plain, for every task and budget."""
    found = []
    for of_budget in by_budget(rows).values():
        of_task, left_out = latest(of_budget, "sigmas", "draws")
        caption = "Differences are flat minus plain, mean and standard deviation over pairs; time is of the processor."
        if left_out:
            caption += f" {left_out} lines of other settings are left out."
        table = Table(title=f"Flat training: {title_of(of_task[0])}", caption=caption, title_justify="left")
        metric = of_task[0]["metric"] or "score"
        columns = ("contestant", "rate", "sigma", "pairs", f"{metric}, plain", f"{metric}, difference", "loss, plain")
        under = ("loss, difference", "loss under noise, plain", "loss under noise, difference", "time, ratio")
        for heading in (*columns, *under):
            table.add_column(heading, justify="left" if heading == "contestant" else "right")
        for (method, rate, sigma), flat in by(of_task, "method", "rate", "sigma").items():
            group = {
                row["seed"]: row for row in of_task if (row["method"], row["rate"], row["sigma"]) == (method, rate, 0)
            }
            pairs = [(group[row["seed"]], row) for row in flat if row["seed"] in group]
            if not sigma or not pairs:
                continue
            noisy = [tuple(_under(row, sigma) for row in pair) for pair in pairs]
            table.add_row(
                method,
                f"{rate:g}",
                f"{sigma:g}",
                str(len(pairs)),
                spread([plain["score"] for plain, _ in pairs], 2),
                spread([_difference(each["score"] for each in pair) for pair in pairs], 2),
                spread([plain["loss"] for plain, _ in pairs], 3),
                spread([_difference(each["loss"] for each in pair) for pair in pairs], 3),
                spread([plain for plain, _ in noisy], 3),
                spread([_difference(pair) for pair in noisy], 3),
                spread([each["processor_seconds"] / plain["processor_seconds"] for plain, each in pairs], 2),
            )
        found.append(table)
    return found


def _under(row: Row, sigma: float) -> float | None:
    """Returns the loss of a line under fresh noise of a size."""
    return next((each["loss"] for each in row["noise"] if each["sigma"] == sigma), None)


def _difference(pair: Any) -> float | None:
    plain, flat = pair
    return None if plain is None or flat is None else flat - plain


def main(argv: Sequence[str]) -> None:
    """Measures what is not in the file yet."""
    parser = HfArgumentParser([Arguments, Sources], prog="python -m benchmarks run flat")  # type: ignore[list-item]
    args, sources = parser.parse_args_into_dataclasses(list(argv))
    if any(sigma <= 0 for sigma in args.sigmas) or args.pairs < 1 or args.draws < 1:
        raise UserError("sigmas, pairs and draws: sizes of noise are above 0, and there is one pair and draw at least")
    tasks, contestants = load(args, sources)
    for pair in range(args.pairs):  # all tasks have their first pair first
        for task in tasks:
            for contestant in contestants:
                measure_pair(args, sources, task.name, contestant, pair, lines.command("flat", argv))


if __name__ == "__main__":
    run_main(main)
