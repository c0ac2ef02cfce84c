"""Plots of the lines: loss against the learning rate, loss and score against bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from peft_ext.presentation import colours, tidy  # noqa: E402

from .summary import Point, Row, by, front, mean_loss  # noqa: E402

_MARKERS = {"float32": "o", "int8": "s", "int4": "^"}
_COLUMNS = 4
_FEW = 5  # rates whose names have room below an axis; a logarithmic one has few ticks of its own there
_ROOM = 1.6  # losses are drawn up to this many times the best: beyond it, one curve would flatten all


def plot_rates(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draws mean loss over seeds against the rate, a panel a method, a curve a contestant; a cross is a divergence.

    Contestants with one rate are left out if others have more.

    Args:
        rows: lines of one task and budget.
        title: of the figure.
        path: the PNG file.
    """
    curves = [of_label for of_label in by(rows, "method").values() if len({row["rate"] for row in of_label}) > 1]
    rows = [row for of_label in curves for row in of_label] or rows
    rates = sorted({row["rate"] for row in rows})
    families = by(rows, "name")
    columns = min(_COLUMNS, len(families))
    lines = -(-len(families) // columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(3.4 * columns, 2.9 * lines + 0.4),
        layout="constrained",
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    low, high = (min(losses), min(max(losses), _ROOM * min(losses))) if losses else (0.0, 1.0)
    room = (high - low) or 1.0
    top = high + 0.05 * room
    for axis, of_family in zip(axes.flat, families.values()):
        contestants = by(of_family, "method")
        for colour, (label, of_label) in zip(colours(len(contestants)), contestants.items()):
            means = {rate: mean_loss(runs) for rate, runs in sorted(by(of_label, "rate").items())}
            stays = {rate: loss for rate, loss in means.items() if math.isfinite(loss)}
            axis.plot(list(stays), list(stays.values()), color=colour, marker="o", markersize=3, label=label)
            gone = [rate for rate in means if rate not in stays]
            axis.plot(gone, [top] * len(gone), color=colour, marker="x", linestyle="none")
        axis.set_xscale("log")
        if len(rates) <= _FEW:
            axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
            axis.minorticks_off()
        axis.set_title(_first_word(of_family[0]["method"]), loc="left", fontsize=10)
        # Below the panel: seven curves leave no room among them.
        axis.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(-0.05, -0.3), ncols=2)
        tidy(axis, "both")
    axes.flat[0].set_ylim(low - 0.05 * room, top + 0.05 * room)
    for axis in axes.flat[len(families) :]:
        axis.set_visible(False)
    for line in axes:
        line[0].set_ylabel("validation loss")
    for axis in axes.flat[max(0, len(families) - columns) : len(families)]:
        axis.set_xlabel("learning rate")
        axis.tick_params(labelbottom=True)  # the last of its column, though there are panels further down in others
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150, bbox_inches="tight")  # long legends push the labels out
    plt.close(figure)


def _first_word(label: str) -> str:
    """Returns what the sizes of a method have in common in their labels."""
    return label.partition(" ")[0]


def plot_front(found: Sequence[Point], name: str, ylabel: str, title: str, path: Path) -> None:
    """Draws a value against bytes with the standard deviation over seeds, and the front as a line.

    Args:
        found: the points of one task. One without bytes, the head alone, is a line across.
        name: `loss` or `score`.
        ylabel: what the value is called.
        title: of the figure.
        path: the PNG file.
    """
    shown = [point for point in found if math.isfinite(point.mean(name))]
    families = list(dict.fromkeys(point.family for point in shown if point.size))
    shades = dict(zip(families, colours(len(families))))
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for point in shown:
        if not point.size:
            axis.axhline(point.mean(name), color="0.5", linestyle=":", linewidth=1, label=point.label)
            continue
        axis.errorbar(
            point.size, point.mean(name), yerr=point.deviation(name), color=shades[point.family],
            marker=_MARKERS[point.dtype], markersize=5, elinewidth=0.8, capsize=2, linestyle="none",
        )  # fmt: skip
    best = front([point for point in shown if point.size], name)
    if best:
        axis.step([point.size for point in best], [point.mean(name) for point in best], color="0.4", linewidth=1,
                  where="post", zorder=0, label="front")  # fmt: skip
    for before, point in zip([None, *best], best):
        if before and before.label == point.label:  # in another type; a second label would be over the first one
            continue
        label = point.label if point.dtype == "float32" else f"{point.label}, {point.dtype}"
        axis.annotate(label, (point.size, point.mean(name)), xytext=(3, -9 if name == "loss" else 5),
                      textcoords="offset points", fontsize=6)  # fmt: skip
    for family, colour in shades.items():
        name_of = next(_first_word(point.label) for point in shown if point.family == family)
        axis.plot([], [], color=colour, marker="o", linestyle="none", label=name_of)
    for dtype in dict.fromkeys(point.dtype for point in shown if point.size):
        axis.plot([], [], color="0.3", marker=_MARKERS[dtype], linestyle="none", label=dtype)
    axis.set_xscale("log")
    _leave_room(axis, [point.mean(name) for point in shown], name)
    axis.set_xlabel("bytes of the adapter")
    axis.set_ylabel(ylabel)
    axis.set_title(title, loc="left", fontsize=11)
    axis.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    tidy(axis, "both")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _leave_room(axis: Any, values: Sequence[float], name: str) -> None:
    """Cuts off losses that are far above all others, such as those of a rate that nearly diverged."""
    if name == "loss" and values and max(values) > _ROOM * min(values):
        axis.set_ylim(min(values) - 0.1 * mean(values), _ROOM * min(values))
