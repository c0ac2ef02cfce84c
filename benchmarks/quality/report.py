"""Tables and plots of the two benchmarks of quality."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from peft_ext.presentation import spread

from .figures import plot_front, plot_rates
from .runs import title_of
from .summary import Row, at_same_seeds, by, by_budget, chosen, front, latest, mean_loss, points

_TOLERANCE = 1.05  # "about as good as the best rate"


def _note(left_out: int) -> str | None:
    return f"{left_out} lines of another configuration, or of an earlier search, are left out" if left_out else None


def report_rates(rows: Sequence[Row], folder: Path) -> tuple[list[Table], list[str]]:
    """Returns a table of losses at every rate for every task, and draws the curves.

    The rates of a contestant are compared by the seeds that all of them have.
    """
    tables, files = [], []
    for stem, group in by_budget(rows).items():
        title, (of_task, left_out) = title_of(group[0]), latest(group)
        rates = sorted({row["rate"] for row in of_task})
        table = Table(title=f"Loss at each rate: {title}", caption=_note(left_out), title_justify="left")
        for heading in (
            "contestant",
            "coefficients",
            "seeds",
            *(f"{rate:g}" for rate in rates),
            "within 5 % of its best",
        ):
            table.add_column(heading, justify="left" if heading == "contestant" else "right")
        drawn = []
        for label, of_label in by(of_task, "method").items():
            runs, seeds = at_same_seeds(of_label)
            drawn += runs
            losses = {rate: mean_loss(of_rate) for rate, of_rate in sorted(by(runs, "rate").items())}
            best = min(losses.values())
            good = [f"{rate:g}" for rate, loss in losses.items() if math.isfinite(best) and loss <= _TOLERANCE * best]
            cells = [_loss_cell(losses.get(rate), best) for rate in rates]
            used = _seeds_cell(seeds, len({row["seed"] for row in of_label}))
            table.add_row(label, f"{runs[-1]['coefficients']:,}", used, *cells, ", ".join(good) or "none")
        tables.append(table)
        files.append(f"learning-rates-{stem}.png")
        plot_rates(drawn, title, folder / files[-1])
    return tables, files


def _seeds_cell(seeds: Sequence[int], count: int) -> str:
    """Returns the seeds by which rates are compared, and of how many they are where others are left out."""
    if not seeds:
        return f"{count}, other ones at each rate"
    return ", ".join(map(str, seeds)) + (f" (of {count})" if len(seeds) < count else "")


def _loss_cell(loss: float | None, best: float) -> str:
    if loss is None:
        return ""
    if math.isinf(loss):
        return "diverged"
    return f"[bold]{loss:.3f}[/bold]" if loss == best else f"{loss:.3f}"


def report_quality(rows: Sequence[Row], folder: Path) -> tuple[list[Table], list[str]]:
    """Returns a table of all points for every task, from few bytes to many, and draws the fronts."""
    tables, files = [], []
    for stem, group in by_budget(rows).items():
        title, (of_task, left_out) = title_of(group[0]), chosen(group)
        found = points(of_task)
        score = next((row["metric"] for row in of_task if row.get("metric")), None)
        best = {name: front([point for point in found if point.size], name) for name in ("loss", "score")}
        table = Table(title=f"Quality against bytes: {title}", caption=_note(left_out), title_justify="left")
        headings = [
            "contestant",
            "saved in",
            "coefficients",
            "bytes",
            "rate",
            "loss",
            *([score] if score else []),
            "on the front",
        ]
        for heading in headings:
            table.add_column(heading, justify="left" if heading in headings[:2] else "right")
        lines = {row["method"]: row for row in of_task}
        for point in sorted(found, key=lambda point: (point.size, point.label)):
            line = lines[point.label]
            edge = line["rate"] in (min(line["search"]["rates"]), max(line["search"]["rates"]))
            cells = [
                f"{line['coefficients']:,}",
                f"{point.size:,}",
                f"{line['rate']:g}" + (" (end of grid)" if edge else ""),
            ]
            lost = f" ({point.diverged()} of {len(point.values['loss'])} diverged)" if point.diverged() else ""
            cells.append(spread(point.values["loss"], 3) + lost)
            cells += [spread(point.values["score"], 1)] if score else []
            on = [name if name == "loss" else str(score) for name in best if point in best[name]]
            table.add_row(point.label, point.dtype, *cells, ", ".join(on))
        tables.append(table)
        for name, ylabel in (("loss", "validation loss"), *([("score", str(score))] if score else [])):
            files.append(f"quality-{stem}-{name if name == 'loss' else score}.png")
            plot_front(found, name, ylabel, title, folder / files[-1])
    return tables, files
