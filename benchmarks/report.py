"""Tables and plots of what was measured, from the lines alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from peft_ext.presentation import spread
from recipes.support.arguments import UserError
from recipes.support.methods import folder_name

from . import brainwash, catalog, flat, lines, many_adapters, scaling, soup, soup_memory, step_time
from .quality import report as quality

Row = dict[str, Any]
_SIZES = ("adapters", "rows")  # numbers that are chosen, as texts are, and not measured
# How a line was measured, which a table of what was measured leaves out.
_HOW = {"machine", "versions", "command", "processor", "threads", "torch", "peft", "seed", "budget"}
_DIGITS = 4


def tables(name: str, rows: Sequence[Row]) -> list[Table]:
    """Returns a table for any lines of every budget."""
    return [_table(", ".join(filter(None, [name, text])), group) for text, group in lines.apart(rows, "budget").items()]


def _table(name: str, rows: Sequence[Row]) -> Table:
    """Returns a table: a row for what has the same texts and sizes, with mean and deviation of the other numbers."""
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in _HOW]
    texts = [key for key in columns if key in _SIZES or any(isinstance(row.get(key), str) for row in rows)]
    numbers = [key for key in columns if key not in texts]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row.get(key, "")) for key in texts), []).append(row)
    found = Table(title=name, title_justify="left")
    for key in texts:
        found.add_column(key.replace("_", " "))
    for key in numbers:
        found.add_column(key.replace("_", " "), justify="right")
    for values, group in groups.items():
        found.add_row(*values, *(_cell([row.get(number) for row in group]) for number in numbers))
    return found


def _cell(values: Sequence[Any]) -> str:
    present = [value for value in values if value is not None]
    if all(isinstance(value, int) for value in present) and len(set(present)) == 1:
        return f"{present[0]:,}"
    if not all(isinstance(value, (int, float)) for value in present):
        shown = [[round(part, _DIGITS) for part in each] if isinstance(each, list) else each for each in present]
        return ", ".join(dict.fromkeys(map(str, shown)))
    return spread(present, _DIGITS)


def _many_adapters(rows: Sequence[Row], folder: Path) -> tuple[list[Table], list[str]]:
    many_adapters.plot(list(rows), str(folder / "many-adapters.png"))
    return tables("many_adapters", rows), ["many-adapters.png"]


def _scaling(rows: Sequence[Row], folder: Path) -> tuple[list[Table], list[str]]:
    shown: list[Table] = []
    files: list[str] = []
    for text, group in lines.apart(rows, "budget").items():
        shown.append(scaling.table(group, text))
        files.append(f"{folder_name(f'scaling {text}') if files else 'scaling'}.png")
        scaling.plot(group, folder / files[-1])
    return shown, files


REPORTERS: dict[str, Callable[[Sequence[Row], Path], tuple[list[Table], list[str]]]] = {
    "learning_rates": quality.report_rates,
    "quality": quality.report_quality,
    "brainwash": lambda rows, folder: (brainwash.tables(rows), []),
    "flat": lambda rows, folder: (flat.tables(rows), []),
    "many_adapters": _many_adapters,
    "scaling": _scaling,
    "soup": lambda rows, folder: (soup.tables(rows), []),
    "soup_memory": lambda rows, folder: (soup_memory.tables(rows), []),
    "step_time": lambda rows, folder: (step_time.tables(rows), []),
}


def report(name: str | None, results: Path, output: Path) -> None:
    """Prints the tables of one benchmark, or of all that have results, and draws their plots.

    Args:
        name: of the benchmark; None for all.
        results: folder of the lines.
        output: folder of the plots, which is made.

    Raises:
        UserError: there is no such benchmark, or it has no lines.
    """
    if name is not None:
        catalog.check_name(name)
    found = {each: lines.read(results / f"{each}.jsonl") for each in ([name] if name else catalog.NEEDS)}
    found = {each: rows for each, rows in found.items() if rows}
    if not found:
        raise UserError(
            f"there are no results of {name or 'any benchmark'} in {results}; run it first, or give --results"
        )
    output.mkdir(parents=True, exist_ok=True)
    console = Console()
    # A pipe has no width of its own; the table must not be cut to 80 columns there.
    console = console if console.is_terminal else Console(width=200)
    for each, rows in found.items():
        found_tables, files = REPORTERS.get(each, lambda rows, folder: (tables(each, rows), []))(rows, output)  # noqa: B023
        for shown in found_tables:
            console.print(shown)
        for file in files:
            console.print(f"wrote {output / file}", markup=False, highlight=False, soft_wrap=True)
