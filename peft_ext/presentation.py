"""How figures are shown everywhere: spreads as text, colours and axes of plots."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import mean, stdev
from typing import Any

import numpy as np

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
"""Okabe and Ito's colours, told apart by colour-blind readers too."""


def colours(count: int) -> list[str]:
    """Returns colours that all differ: those of `COLOURS`, and further ones as far from them and each other as can be.

    Distances are Euclidean in CIELAB, among colours of middle lightness that are not grey.

    Args:
        count: how many are wanted, at most a few hundred.
    """
    levels = np.linspace(0, 1, 17)
    every = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    places = _lab(every)
    usable = (places[:, 0] > 30) & (places[:, 0] < 80) & (np.hypot(places[:, 1], places[:, 2]) > 30)
    every, places = every[usable], places[usable]
    chosen = list(COLOURS)
    known = _lab(np.array([[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in chosen]))
    nearest = np.linalg.norm(places[:, None] - known, axis=-1).min(1)
    while len(chosen) < count:
        farthest = int(nearest.argmax())
        chosen.append("#" + "".join(f"{round(255 * part):02X}" for part in every[farthest]))
        nearest = np.minimum(nearest, np.linalg.norm(places - places[farthest], axis=-1))
    return chosen[:count]


def _lab(rgb: np.ndarray) -> np.ndarray:
    """Returns sRGB colours `(n, 3)` between 0 and 1 in CIELAB with the white of D65 (IEC 61966-2-1; CIE 15)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    ratio = linear @ to_xyz.T / to_xyz.sum(1)
    x, y, z = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / 3 / (6 / 29) ** 2 + 4 / 29).T
    return np.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), -1)


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
