"""The entry to all benchmarks.

    python -m benchmarks list
    python -m benchmarks run NAME [arguments of the benchmark; --help lists them]
    python -m benchmarks report [NAME] [--results FOLDER] [--output FOLDER]

`report` trains and measures nothing: its tables and plots come from the lines in `benchmarks/results` alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from recipes.support.arguments import run_main

from . import catalog
from .lines import RESULTS


def main(argv: Sequence[str]) -> None:
    """Lists, runs or reports."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measures, and shows what was measured.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names, what is measured, what it needs")
    run = commands.add_parser("run", help="run a benchmark", add_help=False)
    run.add_argument("name")
    run.add_argument("arguments", nargs=argparse.REMAINDER)
    report = commands.add_parser("report", help="tables and plots of what was measured")
    report.add_argument("name", nargs="?", help="a benchmark; all that have results by default")
    report.add_argument("--results", type=Path, default=RESULTS, help="folder of the lines")
    report.add_argument("--output", type=Path, default=Path("outputs/benchmarks"), help="folder of the plots")
    args = parser.parse_args(argv)
    if args.command == "list":
        table = Table("name", "what is measured", "needs", box=None)
        for name, needs in catalog.NEEDS.items():
            table.add_row(name, catalog.summary(name), needs)
        Console(width=None if Console().is_terminal else 200).print(table)
    elif args.command == "run":
        catalog.run(args.name, args.arguments)
    else:
        from .report import report as show  # imports benchmarks, which `run` is to find unimported

        show(args.name, args.results, args.output)


if __name__ == "__main__":
    run_main(main)
