"""Quality against bytes: the best rate of every contestant from some seeds, then other seeds at that rate.

    python -m benchmarks run quality --tasks sst2 --sst2_model <folder> --sst2_data <folder>
    python -m benchmarks report quality

The search is that of `learning_rates`: its lines are in `learning_rates.jsonl`, and those that are there are used.
Where the best rate is the lowest or the highest one, it goes on in that direction, since methods differ in theirs by a
factor of 100. The trainings at the best rate, with other seeds, are in `quality.jsonl`; adapters of ours are evaluated
after saving and loading in int8 and int4 too. Search and scores share the validation rows, which flatters all alike.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from recipes.support.arguments import UserError, run_main

from .. import lines
from . import learning_rates
from .contestants import Contestant
from .runs import RATES, RunArguments, grid, load
from .summary import mean_loss
from .task import QualityTask, Sources

FILE = "quality.jsonl"
DTYPES = ("int8", "int4")
LADDER = [1e-5, 3e-5, *RATES, 3e-1, 1.0, 3.0, 10.0, 30.0]
"""Where a search goes on beyond the rates that it was given."""


@dataclass
class Arguments(RunArguments):
    """What is measured."""

    search_seeds: list[int] = field(
        default_factory=lambda: [0, 4], metadata={"help": "Seeds of the trainings whose mean loss chooses the rate."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [1, 2, 3], metadata={"help": "Seeds of the trainings at the best rate."}
    )


def search(
    task: QualityTask,
    contestant: Contestant,
    rates: Sequence[float],
    seeds: Sequence[int],
    known: Path,
    command: Sequence[str],
) -> tuple[float | None, list[float]]:
    """Looks for the rate with the lowest mean loss, beyond the given ones where it is the first or last of those tried.

    Args:
        task, contestant: of the trainings.
        rates: that are tried in any case.
        seeds: of the trainings at every rate. After one that diverged, a rate gets no further ones.
        known: the file with the lines.
        command: what is run, for the lines.

    Returns:
        The best rate, None where all diverged or there is no training, and the rates that were tried.
    """
    losses: dict[float, float] = {}
    ahead = list(rates)
    while ahead:
        for rate in ahead:
            rows = []
            for run in grid(task, contestant, [rate], seeds):
                rows.append(run.line(known, command))
                if rows[-1]["loss"] is None:
                    break
            if rows:
                losses[rate] = mean_loss(rows)
        ahead = _beyond(losses)
    finite = [rate for rate, loss in losses.items() if math.isfinite(loss)]
    return min(finite, key=losses.__getitem__, default=None), sorted(losses)


def _beyond(losses: dict[float, float]) -> list[float]:
    """The next rate on the side where losses still fall, nothing where they do not."""
    best = min(losses.values(), default=math.inf)
    if math.isinf(best):
        return []
    # Equal losses, such as those of a head that the rate does not touch, do not fall.
    where = [rate for rate, loss in losses.items() if loss == best]
    if max(losses) in where and min(losses) not in where:
        return [rate for rate in LADDER if rate > max(losses)][:1]
    if min(losses) in where and max(losses) not in where:
        return [rate for rate in LADDER if rate < min(losses)][-1:]
    return []


def main(argv: Sequence[str]) -> None:
    """Measures what is not in the files yet."""
    parser = HfArgumentParser([Arguments, Sources], prog="python -m benchmarks run quality")  # type: ignore[list-item]
    args, sources = parser.parse_args_into_dataclasses(list(argv))
    if not args.search_seeds:
        raise UserError("search_seeds: none is given; the rate is chosen by them")
    if both := sorted(set(args.search_seeds) & set(args.seeds)):
        raise UserError(f"search_seeds: {both[0]} is one of --seeds; the rate would be chosen on what it scores")
    tasks, contestants = load(args, sources)
    command, folder = lines.command("quality", argv), Path(args.output)
    for task in tasks:
        for contestant in contestants:
            best, tried = search(task, contestant, args.rates, args.search_seeds, folder / learning_rates.FILE, command)
            if best is None:
                if tried:
                    print(f"{task.name}, {contestant.label}: every rate diverged; it has no point", file=sys.stderr)
                continue
            for run in grid(task, contestant, [best], args.seeds):
                run.line(folder / FILE, command, DTYPES, search={"seeds": args.search_seeds, "rates": tried})


if __name__ == "__main__":
    run_main(main)
