"""The figures of an unlearning report, made without pyplot, which would choose a backend for the whole program."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...presentation import COLOURS, colours, tidy
from .results import GOLD, ORIGINAL, SPLITS, UnlearningResult, grouped
from .tables import METRICS, by_case, cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
_ORIGINAL_COLOUR, _GOLD_COLOUR = "0.55", "black"
_GOLD_LABEL = "gold: retrained without the forget set"


def _styles(methods: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Returns a colour of its own and a marker for every method, the same in all figures of a report."""
    others = [method for method in dict.fromkeys(methods) if method not in (ORIGINAL, GOLD)]
    styles = {ORIGINAL: (_ORIGINAL_COLOUR, "o"), GOLD: (_GOLD_COLOUR, "*")}
    for index, (method, colour) in enumerate(zip(others, colours(len(others)))):
        styles[method] = (colour, _MARKERS[index % len(_MARKERS)])
    return styles


def _label(method: str) -> str:
    return f"{method} (gold)" if method == GOLD else method


def _log_axis(axis: Any) -> None:
    """Makes the x axis logarithmic, with plain numbers that do not overlap at its ticks."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=5))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def accuracy_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draws the accuracies, or the losses of language models, on the forget, the retain and the test set.

    A bar is the mean of a method, a point one of its seeds; a line and a band are the golds' mean and deviation.

    Args:
        rows: all rows of `table`.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    cases, styles = by_case(rows), _styles(row["method"] for row in rows)
    heights = [1.1 + 0.36 * len(of_case) for of_case in cases.values()]
    figure = Figure(figsize=(11, 0.5 + sum(heights)), layout="constrained")
    parts = figure.subfigures(len(cases), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, (case, of_case) in zip(parts, cases.items()):
        kind = "accuracy" if "accuracy_forget" in of_case[0] else "loss"
        part.suptitle(case, x=0.01, ha="left", fontsize=12, fontweight="bold")
        for axis, split in zip(part.subplots(1, len(SPLITS), sharey=True), SPLITS):
            shown = METRICS[f"{kind}_{split}"]
            found = [row[f"{kind}_{split}"] for row in of_case]
            gold = next((metric for row, metric in zip(of_case, found) if row["method"] == GOLD), None)
            largest = 100.0
            if kind == "loss":
                finite = [value for metric in found for value in metric["values"] if math.isfinite(value)]
                largest = max(finite, default=1.0) or 1.0
            if gold and math.isfinite(gold["mean"]):
                middle, deviation = shown.scale * gold["mean"], shown.scale * (gold["std"] or 0)
                axis.axvspan(middle - deviation, middle + deviation, color=_GOLD_COLOUR, alpha=0.12, linewidth=0)
                axis.axvline(middle, color=_GOLD_COLOUR, linewidth=1.2, linestyle="--", zorder=3)
            for place, (row, metric) in enumerate(zip(of_case, found)):
                colour, marker = styles[row["method"]]
                values = [shown.scale * value for value in metric["values"]]
                axis.barh(place, shown.scale * metric["mean"], color=colour, alpha=0.4, height=0.66)
                # The points are spread over the bar's width in the order of the seeds: equal values stay apart.
                places = [place + 0.54 * ((index + 0.5) / len(values) - 0.5) for index in range(len(values))]
                axis.scatter(values, places, color=colour, marker=marker, s=16, linewidth=0, zorder=4)
                axis.text(1.06 * largest, place, cell(metric, shown), va="center", fontsize=8.5)
            axis.set_xlim(0, 1.5 * largest)
            axis.set_xticks(
                [0, 25, 50, 75, 100] if kind == "accuracy" else [t for t in axis.get_xticks() if t <= largest]
            )
            unit = "accuracy (%)" if kind == "accuracy" else "loss (nats per token)"
            axis.set_xlabel(f"{split} {unit}", loc="left")
            axis.set_yticks(range(len(of_case)), [_label(row["method"]) for row in of_case])
            axis.set_ylim(len(of_case) - 0.5, -0.5)
            axis.spines["bottom"].set_bounds(0, largest)
            axis.tick_params(axis="y", length=0)
            tidy(axis, "x")
    handles = [
        Line2D([], [], color=_GOLD_COLOUR, linestyle="--", linewidth=1.2, label=f"{_GOLD_LABEL} (mean)"),
        Patch(color=_GOLD_COLOUR, alpha=0.12, linewidth=0, label="± standard deviation of the golds"),
        Line2D([], [], color="0.3", linestyle="", marker="o", markersize=3.5, label="one seed"),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    return figure


def losses_figure(results: Sequence[UnlearningResult]) -> Figure:
    """Draws histograms of the losses of forget and held-out samples, one for every method, all seeds together.

    Args:
        results: all runs of all cases.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    cases = grouped(results)
    lines = [math.ceil(len(methods) / 5) for methods in cases.values()]
    heights = [0.7 + 1.75 * number for number in lines]
    figure = Figure(figsize=(11, 0.5 + sum(heights)), layout="constrained")
    parts = figure.subfigures(len(cases), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, number, (case, methods) in zip(parts, lines, cases.items()):
        part.suptitle(case, x=0.01, ha="left", fontsize=12, fontweight="bold")
        pooled = {}
        for method, runs in methods.items():
            pairs = [(run.outcomes["forget"].losses, run.non_members.losses) for run in runs.values()]
            pooled[method] = [np.concatenate(losses) for losses in zip(*pairs)]
        everything = np.concatenate([losses for pair in pooled.values() for losses in pair])
        finite = everything[np.isfinite(everything)]
        # Losses of well-fitted samples reach down to 0: those below the first bin are counted in it.
        low, high = np.quantile(finite, [0.02, 1]) if len(finite) else (0.1, 1.0)
        low = max(low, 1e-6)
        bins = np.geomspace(low, max(high, 10 * low), 31)
        columns = math.ceil(len(methods) / number)
        axes = part.subplots(number, columns, squeeze=False, sharex=True).flat
        for axis, (method, pair) in zip(axes, pooled.items()):
            for losses, colour in zip(pair, (COLOURS[1], COLOURS[0])):
                counts, _ = np.histogram(np.clip(losses[np.isfinite(losses)], bins[0], bins[-1]), bins)
                shares = counts / max(len(losses), 1)
                axis.stairs(shares, bins, fill=True, color=colour, alpha=0.35)
                axis.stairs(shares, bins, color=colour, linewidth=1.2)
            axis.set_ylim(bottom=0)
            axis.set_title(_label(method), loc="left", fontsize=9.5)
            axis.set_xlim(bins[0] / 1.2, bins[-1] * 1.2)
            _log_axis(axis)
            axis.tick_params(labelsize=8.5)
            # Heights say nothing that areas do not say, and on a common axis a narrow peak would flatten all others.
            axis.set_yticks([])
            tidy(axis, "x")
        for place, axis in enumerate(part.axes):
            # The lowest axis that is not empty has the label of its column.
            if place + columns >= len(pooled) > place:
                axis.set_xlabel("loss (nats)", fontsize=9)
                axis.tick_params(labelbottom=True)
            if place % columns == 0:
                axis.set_ylabel("share of samples", fontsize=9)
            axis.set_visible(place < len(pooled))
    handles = [
        Patch(color=COLOURS[1], alpha=0.6, label="forget set"),
        Patch(color=COLOURS[0], alpha=0.6, label="held-out"),
        Line2D([], [], linestyle="", label=_GOLD_LABEL),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    return figure


def _gap_to_gold(row: dict[str, Any]) -> tuple[float | None, list[float]]:
    """Returns the distance to the gold that the trade-off shows, and its values by seed.

    It is the Jensen-Shannon divergence on the forget set; of language models, which have none, the gap of the forget
    loss, without values by seed. In the gold's row it is what golds differ by.
    """
    if "js_forget" in row:
        return row["js_forget"]["mean"], row["js_forget"]["values"]
    gap = row["loss_forget"].get("gap", row["loss_forget"]["std"])
    return (None if gap is None else abs(gap)), []


def tradeoff_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draws the distance to the gold against time: a point for the mean of a method, a faint one for every seed.

    Args:
        rows: all rows of `table`.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    cases, styles = by_case(rows), _styles(row["method"] for row in rows)
    columns = min(3, len(cases))
    lines = math.ceil(len(cases) / columns)
    figure = Figure(figsize=(3.9 * columns + 2.2, 3.5 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis, (case, of_case) in zip(axes, cases.items()):
        gold = next((row for row in of_case if row["method"] == GOLD), None)
        original = next((row for row in of_case if row["method"] == ORIGINAL), None)
        if gold and "seconds" in gold:
            axis.axvline(gold["seconds"]["mean"], color=_GOLD_COLOUR, linewidth=1, linestyle="--", zorder=1)
        if gold and (noise := _gap_to_gold(gold)[0]) is not None:
            axis.axhline(noise, color=_GOLD_COLOUR, linewidth=1, linestyle=":", zorder=1)
        if original and (gap := _gap_to_gold(original)[0]) is not None:
            axis.axhline(gap, color=_ORIGINAL_COLOUR, linewidth=1.2, zorder=1)
        for row in of_case:
            gap, values = _gap_to_gold(row)
            if row["method"] in (ORIGINAL, GOLD) or gap is None or "seconds" not in row:
                continue
            colour, marker = styles[row["method"]]
            if len(values) > 1 and len(values) == len(row["seconds"]["values"]):
                known = [(t, v) for t, v in zip(row["seconds"]["values"], values) if t is not None and v is not None]
                axis.scatter(*zip(*known), color=colour, marker=marker, s=14, alpha=0.35, linewidth=0, clip_on=False)
            axis.scatter(row["seconds"]["mean"], gap, color=colour, marker=marker, s=48, zorder=3, clip_on=False)
        _log_axis(axis)
        axis.set_ylim(bottom=0)
        if not axis.collections:
            text = "no method with a time and a gold"
            axis.text(0.5, 0.5, text, ha="center", va="center", color="0.4", transform=axis.transAxes)
            axis.set_xticks([])
        axis.set_title(case, loc="left", fontsize=11)
        axis.set_xlabel("seconds")
        tidy(axis, "both")
        classifier = "js_forget" in of_case[0]
        axis.set_ylabel(
            "JS divergence to the gold\non the forget set (nats)" if classifier else "|forget loss - gold's| (nats)"
        )
    for axis in axes[len(cases) :]:
        axis.set_visible(False)
    handles = [
        Line2D([], [], color=_ORIGINAL_COLOUR, linewidth=1.2, label="distance of the original"),
        Line2D([], [], color=_GOLD_COLOUR, linewidth=1, linestyle=":", label="distance between golds"),
        Line2D([], [], color=_GOLD_COLOUR, linewidth=1, linestyle="--", label="time of retraining"),
    ]
    for method, (colour, marker) in styles.items():
        if method not in (ORIGINAL, GOLD):
            handles.append(Line2D([], [], color=colour, linestyle="", marker=marker, label=method))
    title = _GOLD_LABEL.replace(" without", "\nwithout")
    figure.legend(
        handles=handles,
        title=title,
        loc="outside right upper",
        frameon=False,
        fontsize=9,
        title_fontsize=9,
        alignment="left",
    )
    return figure
