"""What lines say together: which belong together, means over seeds, which points are on the front."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

Row = dict[str, Any]


def by_budget(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Returns the lines that can be compared with each other: those of one task and one budget.

    They are under the name that files have: that of the task for the budget with the most lines, and with what is
    different for the others.
    """
    found = {}
    for task, of_task in by(rows, "task").items():
        budgets: dict[Any, list[Row]] = {}
        for row in of_task:
            budgets.setdefault(tuple(sorted(row["budget"].items())), []).append(row)
        most, *others = sorted(budgets.values(), key=len, reverse=True)
        found[task] = most
        for group in others:
            budget, usual = group[0]["budget"], most[0]["budget"]
            names = [name for name in sorted({*budget, *usual}) if budget.get(name) != usual.get(name)]
            found["-".join([task, *(f"{name}-{budget.get(name, 'usual')}" for name in names)])] = group
    return found


def at_same_seeds(rows: Sequence[Row]) -> tuple[list[Row], list[int]]:
    """Returns the lines of one contestant at the seeds that all of its rates have, and these seeds.

    A rate that diverged stays so with any seeds: it keeps all of its lines, and decides nothing for the others. Where
    no seed is common to those, all lines are returned, and no seeds.
    """
    rates = by(rows, "rate")
    lost = {rate for rate, of_rate in rates.items() if math.isinf(mean_loss(of_rate))}
    seeds = [{row["seed"] for row in of_rate} for rate, of_rate in rates.items() if rate not in lost]
    common = set.intersection(*seeds or [{row["seed"] for row in rows}])
    return [row for row in rows if not common or row["rate"] in lost or row["seed"] in common], sorted(common)


def latest(rows: Sequence[Row], *names: str) -> tuple[list[Row], int]:
    """Returns the lines that belong to the last one of their contestant, and how many do not.

    A contestant's have one configuration: after a default has changed, the old lines are of another method.

    Args:
        rows: lines of one task and budget.
        names: what else a contestant's lines have in common.
    """
    last = {row["method"]: row for row in rows}
    same = ("config", *names)
    kept = [row for row in rows if all(row[name] == last[row["method"]][name] for name in same)]
    return kept, len(rows) - len(kept)


def chosen(rows: Sequence[Row]) -> tuple[list[Row], int]:
    """Returns the lines at the rate that was chosen last, the last one of every seed, and how many lines are others."""
    kept, _ = latest(rows, "rate")
    kept = list({(row["method"], row["seed"]): row for row in kept}.values())
    return kept, len(rows) - len(kept)


def by(rows: Iterable[Row], *names: str) -> dict[Any, list[Row]]:
    """Returns the lines by the values of some names, in order of first appearance."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[names[0]] if len(names) == 1 else tuple(row[name] for name in names), []).append(row)
    return groups


def mean_loss(rows: Sequence[Row]) -> float:
    """Returns the mean over seeds; infinity if one diverged."""
    return math.inf if any(row["loss"] is None for row in rows) else mean(row["loss"] for row in rows)


@dataclass(frozen=True)
class Point:
    """A contestant, saved in one type.

    Attributes:
        label, family: the contestant, and its PEFT method.
        dtype: what its coefficients are saved in.
        size: bytes of the adapter without the head.
        values: by name (`loss`, `score`): one of every seed; None for a training that diverged.
    """

    label: str
    family: str
    dtype: str
    size: int
    values: dict[str, list[float | None]]

    def diverged(self) -> int:
        """Returns how many seeds have no loss."""
        return sum(value is None for value in self.values["loss"])

    def mean(self, name: str) -> float:
        """Returns the mean over seeds, NaN if one diverged or the task has no such value."""
        return mean(self._known(name) or [math.nan])

    def deviation(self, name: str) -> float:
        """Returns the standard deviation over seeds, 0 for a single one."""
        values = self._known(name)
        return stdev(values) if len(values) > 1 else 0.0

    def _known(self, name: str) -> list[float]:
        """The values of all seeds, or nothing where one has none: a mean of the rest would flatter."""
        values = [value for value in self.values[name] if value is not None]
        return values if len(values) == len(self.values[name]) else []


def points(rows: Sequence[Row]) -> list[Point]:
    """Returns the points of one task's lines: every contestant in every type that it was evaluated in."""
    found = []
    for label, of_label in by(rows, "method").items():
        for dtype in dict.fromkeys(dtype for row in of_label for dtype in row["saved"]):
            # Only the types that an adapter was loaded from again have values of their own.
            each = [{**row, **row["saved"].get(dtype, {"loss": None, "score": None})} for row in of_label]
            values = {name: [row[name] for row in each] for name in ("loss", "score")}
            size = next(row["saved"][dtype]["bytes"] for row in of_label if dtype in row["saved"])
            found.append(Point(label, of_label[0]["name"], dtype, size, values))
    return found


def front(found: Sequence[Point], name: str) -> list[Point]:
    """Returns the points that none with as few bytes beats, from few bytes to many. Losses are beaten by lower ones."""
    sign = 1 if name == "loss" else -1
    chosen: list[Point] = []
    for point in sorted(found, key=lambda point: (point.size, sign * point.mean(name))):
        value = sign * point.mean(name)
        if math.isfinite(value) and (not chosen or value < sign * chosen[-1].mean(name)):
            chosen.append(point)
    return chosen
