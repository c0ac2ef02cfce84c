"""What a comparison leaves behind: results as JSON, a table, plots of losses and scores."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, Protocol, TypeVar

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import LogLocator, NullLocator  # noqa: E402
from rich import box  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from peft_ext.files import write_whole
from peft_ext.presentation import colours, spread, tidy

_FILE = "result.json"


class _HasLabel(Protocol):
    label: str


Labelled = TypeVar("Labelled", bound=_HasLabel)


@dataclass
class RunResult:
    """One method trained once; the untrained model is a result without training.

    Attributes:
        label: the method's label.
        seed: the run's seed.
        trainable_parameters: how many numbers were trained.
        head_parameters: how many of them are in modules trained whole beside the adapter.
        adapter_bytes: size of the adapter's weights on disk.
        training_loss: mean of the logged training losses of the last tenth of the steps.
        validation_loss: validation loss at the end.
        metrics: further scores by name; higher is better.
        seconds: time spent in training steps.
        training_curve: pairs of a step and its loss.
        validation_curve: pairs of a step and its loss.
        outputs: what the model wrote for every evaluated prompt.
        data_seed: the seed of the subset that was trained on, if it was one.
        detection: how well scores tell outliers from the known classes: a set, a score, AUROC and FPR95 in percent.
    """

    label: str
    seed: int
    trainable_parameters: int = 0
    head_parameters: int = 0
    adapter_bytes: int = 0
    training_loss: float | None = None
    validation_loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    training_curve: list[tuple[float, float]] = field(default_factory=list)
    validation_curve: list[tuple[float, float]] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    data_seed: int | None = None
    detection: list[dict[str, Any]] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Writes the result into a folder as JSON, whole or not at all: a resumed run trusts the file."""
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / _FILE, json.dumps(dataclasses.asdict(self), indent=1))

    @classmethod
    def load(cls, folder: Path) -> RunResult:
        """Returns what `save` wrote; raises a FileNotFoundError where nothing is."""
        return cls(**json.loads((folder / _FILE).read_text(encoding="utf-8")))


def by_label(results: Sequence[Labelled]) -> dict[str, list[Labelled]]:
    """Returns the runs of every method, the methods in order of first appearance."""
    groups: dict[str, list[Labelled]] = {}
    for result in results:
        groups.setdefault(result.label, []).append(result)
    return groups


def results_table(results: Sequence[RunResult], style: box.Box = box.SIMPLE_HEAD) -> Table:
    """Returns a row for every method: mean and, over several runs, standard deviation. A head is counted apart."""
    names = list(dict.fromkeys(name for result in results for name in result.metrics))
    with_head = any(result.head_parameters for result in results)
    table = Table(box=style)
    table.add_column("method")
    counts = ["adapter", "head"] if with_head else ["trainable"]
    for heading in [*counts, "bytes on disk", "training loss", "validation loss", *names, "seconds"]:
        table.add_column(heading.replace("_", " "), justify="right")
    for label, runs in by_label(results).items():
        head = runs[0].head_parameters
        counts = [f"{runs[0].trainable_parameters - head:,}", f"{head:,}"][: len(counts)]
        table.add_row(
            label,
            *counts,
            f"{runs[0].adapter_bytes:,}",
            spread([run.training_loss for run in runs], 3),
            spread([run.validation_loss for run in runs], 3),
            *(spread([run.metrics.get(name) for run in runs], 2) for name in names),
            spread([run.seconds for run in runs], 1),
        )
    return table


def plot_losses(results: Sequence[RunResult], path: Path, unit: str) -> None:
    """Draws training and validation loss against the step, one colour a method, a faint line for every run.

    Args:
        results: all runs; the one without a validation curve is the untrained model, where all those curves start.
        path: the PNG file.
        unit: what the losses are means over.
    """
    untrained, groups = None, {}
    for label, runs in by_label(results).items():
        if runs[0].validation_curve:
            groups[label] = runs
        else:
            untrained = runs[0]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, kind in zip(axes, ("training", "validation")):
        for colour, (label, runs) in zip(colours(len(groups)), groups.items()):
            curves = [getattr(run, f"{kind}_curve") for run in runs]
            if kind == "validation" and untrained is not None and untrained.validation_loss is not None:
                curves = [[(0, untrained.validation_loss), *curve] for curve in curves]
            for curve in curves:
                marker = "o" if len(curve) == 1 else None
                alpha = 1 if len(curves) == 1 else 0.3
                axis.plot(*zip(*curve), color=colour, alpha=alpha, linewidth=1.2, marker=marker)
            if len(curves) > 1:
                steps = [step for step, _ in curves[0]]
                means = [mean(losses) for losses in zip(*([loss for _, loss in curve] for curve in curves))]
                axis.plot(steps[: len(means)], means, color=colour, linewidth=1.8)
            axis.plot([], [], color=colour, linewidth=1.8, label=label)
        axis.set_title(f"{kind.capitalize()} loss", loc="left", fontsize=11)
        axis.set_xlabel("step")
        tidy(axis, "y")
        axis.set_xlim(left=0)
        # Most of the fall is in the first steps; a logarithmic axis leaves room for the differences after it.
        if any(getattr(run, f"{kind}_curve") for runs in groups.values() for run in runs):
            axis.set_yscale("log")
            low, high = axis.get_ylim()
            subs = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if high < 10 * low else (1, 3)
            axis.yaxis.set_major_locator(LogLocator(subs=subs))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_locator(NullLocator())
    axes[0].set_ylabel(f"loss per {unit}")
    axes[1].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_metric(results: Sequence[RunResult], path: Path, name: str) -> None:
    """Draws a metric of every method: a bar for the mean and a point for every run.

    Args:
        results: all runs.
        path: the PNG file.
        name: the metric.
    """
    groups = by_label(results)
    figure, axis = plt.subplots(figsize=(7, 0.6 + 0.5 * len(groups)), layout="constrained")
    for place, (colour, runs) in enumerate(zip(colours(len(groups)), groups.values())):
        values = [run.metrics[name] for run in runs]
        axis.barh(place, mean(values), color=colour, alpha=0.35, height=0.6)
        # Spread over the bar's width in the order of the runs, so that equal values stay apart.
        heights = [place + 0.4 * ((index + 0.5) / len(values) - 0.5) for index in range(len(values))]
        axis.scatter(values, heights, color=colour, s=14, zorder=2)
    axis.set_yticks(range(len(groups)), list(groups))
    axis.invert_yaxis()
    axis.set_xlabel(name)
    tidy(axis, "x")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def markdown(*tables: Table) -> str:
    """Returns tables of the style `box.MARKDOWN` as text."""
    text = io.StringIO()
    Console(file=text, width=200).print(*tables)
    return text.getvalue()


def write_report(
    results: Sequence[RunResult], folder: Path, notes: str, plots: Mapping[str, Callable[[Path], None]]
) -> list[str]:
    """Writes and prints what `write_files` does, with a table of all runs, the untrained model first."""
    return write_files(results, folder, lambda style: [results_table(results, style)], notes, plots)


def write_files(
    results: Sequence[Any],
    folder: Path,
    tables: Callable[[box.Box], Iterable[Table]],
    notes: str,
    plots: Mapping[str, Callable[[Path], None]],
) -> list[str]:
    """Writes ``results.json``, ``results.md`` and the plots, and prints the tables and the notes.

    Args:
        results: all runs, dataclasses.
        folder: where the files go.
        tables: makes the tables in a style.
        notes: Markdown below the tables: some outputs side by side, or what was run.
        plots: what draws every PNG file.

    Returns:
        The names of the files.
    """
    rows = [dataclasses.asdict(result) for result in results]
    write_whole(folder / "results.json", json.dumps(rows, indent=1) + "\n")
    screen = Console()
    # A pipe has no width of its own; tables must not be cut to 80 columns there.
    screen = screen if screen.is_terminal else Console(width=160)
    write_whole(folder / "results.md", f"{markdown(*tables(box.MARKDOWN))}\n{notes}")
    for name, plot in plots.items():
        plot(folder / name)
    for table in tables(box.SIMPLE_HEAD):
        screen.print(table)
    screen.print(notes, markup=False, highlight=False, soft_wrap=True)
    return ["results.json", "results.md", *plots]
