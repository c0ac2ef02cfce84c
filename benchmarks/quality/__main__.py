"""Quality against bytes: the best rate of every contestant from one seed, then other seeds at that rate.

    python -m benchmarks run quality --tasks sst2 --sst2_model <folder> --sst2_data <folder>
    python -m benchmarks report quality

The search is that of `learning_rates`: its lines are in `learning_rates.jsonl`, and those that are there are used. The
trainings at the best rate, with other seeds, are in `quality.jsonl`; adapters of ours are evaluated after saving and
loading in int8 and int4 too. Search and scores share the validation rows, which flatters all alike.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from recipes.support.arguments import UserError, run_main

from .. import lines
from . import learning_rates
from .runs import Run, RunArguments, grid, load
from .task import Sources

FILE = "quality.jsonl"
DTYPES = ("int8", "int4")


@dataclass
class Arguments(RunArguments):
    """What is measured."""

    search_seed: int = field(default=0, metadata={"help": "Seed of the trainings that choose the rate."})
    seeds: list[int] = field(
        default_factory=lambda: [1, 2, 3], metadata={"help": "Seeds of the trainings at the best rate."}
    )


def best_of(runs: Sequence[Run], known: Path, command: Sequence[str]) -> Run | None:
    """Returns the run with the lowest loss, None where all diverged."""
    losses = [run.line(known, command)["loss"] for run in runs]
    found = [place for place, loss in enumerate(losses) if loss is not None]
    return runs[min(found, key=losses.__getitem__)] if found else None


def main(argv: Sequence[str]) -> None:
    """Measures what is not in the files yet."""
    parser = HfArgumentParser([Arguments, Sources], prog="python -m benchmarks run quality")  # type: ignore[list-item]
    args, sources = parser.parse_args_into_dataclasses(list(argv))
    if args.search_seed in args.seeds:
        raise UserError(
            f"search_seed: {args.search_seed} is one of --seeds; the rate would be chosen on what it scores"
        )
    tasks, contestants = load(args, sources)
    command, folder = lines.command("quality", argv), Path(args.output)
    for task in tasks:
        for contestant in contestants:
            searched = grid(task, contestant, args.rates, [args.search_seed])
            best = best_of(searched, folder / learning_rates.FILE, command)
            if searched and best is None:
                print(f"{task.name}, {contestant.label}: every rate diverged; it has no point", file=sys.stderr)
            if best is None:
                continue
            for run in grid(task, contestant, [best.rate], args.seeds):
                search = {"seed": args.search_seed, "rates": args.rates}
                run.line(folder / FILE, command, DTYPES, search=search)


if __name__ == "__main__":
    run_main(main)
