"""Loss against the learning rate, for every task, contestant, rate and seed.

    python -m benchmarks run learning_rates --tasks sst2 --sst2_model <folder> --sst2_data <folder>
    python -m benchmarks report learning_rates

Adds a line a training to `learning_rates.jsonl`. A training whose line is there is not done again, so an interrupted
program goes on where it was. A training that diverged is a line without a loss, with the step where it happened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from recipes.support.arguments import run_main

from .. import lines
from .runs import RunArguments, grid, load
from .task import Sources

FILE = "learning_rates.jsonl"


@dataclass
class Arguments(RunArguments):
    """What is measured."""

    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds of the trainings."})


def main(argv: Sequence[str]) -> None:
    """Measures what is not in the file yet."""
    parser = HfArgumentParser([Arguments, Sources], prog="python -m benchmarks run learning_rates")  # type: ignore[list-item]
    args, sources = parser.parse_args_into_dataclasses(list(argv))
    tasks, contestants = load(args, sources)
    command = lines.command("learning_rates", argv)
    for task in tasks:
        for contestant in contestants:
            for run in grid(task, contestant, args.rates, args.seeds):
                run.line(Path(args.output) / FILE, command)


if __name__ == "__main__":
    run_main(main)
