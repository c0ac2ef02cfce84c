"""How figures are shown everywhere: spreads as text, colours and axes of plots."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import mean, stdev
from typing import Any

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
"""Okabe and Ito's colours, told apart by colour-blind readers too."""


def spread(values: Iterable[float | None], digits: int) -> str:
    """Mean and, of several values, standard deviation as text; a dash for none."""
    present = [value for value in values if value is not None]
    if not present:
        return "-"
    text = f"{mean(present):.{digits}f}"
    if len(present) < 2:
        return text
    return f"{text} ± {stdev(present) if all(map(math.isfinite, present)) else math.nan:.{digits}f}"


def tidy(axis: Any, grid: str) -> None:
    """Gives an axis of matplotlib a pale grid behind the data and takes off the frame.

    Args:
        grid: `"x"`, `"y"` or `"both"`.
    """
    axis.grid(axis=grid, color="0.9", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
