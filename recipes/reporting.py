"""What a run leaves behind: results as JSON, a table, a plot of the losses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter  # noqa: E402
from rich import box  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

# Okabe and Ito's colours, told apart by colour-blind readers too.
_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]


@dataclass
class RunResult:
    """One method trained with one seed; the untrained model is a result without training.

    Attributes:
        label: The method's label.
        seed: The run's seed.
        trainable_parameters: Numbers that were trained.
        adapter_bytes: Size of the adapter's weights on disk.
        training_loss: Mean of the logged training losses of the last tenth of the steps.
        validation_loss: Validation loss at the end.
        metrics: Further scores by name, higher is better.
        seconds: Time spent in training steps.
        training_curve: ``(step, loss)`` pairs.
        validation_curve: ``(step, loss)`` pairs.
        outputs: What the model wrote for every evaluated prompt.
    """

    label: str
    seed: int
    trainable_parameters: int = 0
    adapter_bytes: int = 0
    training_loss: float | None = None
    validation_loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    training_curve: list[tuple[float, float]] = field(default_factory=list)
    validation_curve: list[tuple[float, float]] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all: a resumed run trusts this file."""
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=1), encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> RunResult:
        """Read what `save` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def by_label(results: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """The runs of every method, methods in order of first appearance."""
    groups: dict[str, list[RunResult]] = {}
    for result in results:
        groups.setdefault(result.label, []).append(result)
    return groups


def _spread(values: Sequence[float | None], digits: int) -> str:
    present = [value for value in values if value is not None]
    if not present:
        return "-"
    text = f"{mean(present):.{digits}f}"
    return f"{text} ± {stdev(present):.{digits}f}" if len(present) > 1 else text


def results_table(results: Sequence[RunResult], style: box.Box = box.SIMPLE_HEAD) -> Table:
    """One row a method: mean and, over several seeds, standard deviation."""
    names = list(dict.fromkeys(name for result in results for name in result.metrics))
    table = Table(box=style)
    table.add_column("method")
    for heading in ["trainable", "bytes on disk", "training loss", "validation loss", *names, "seconds"]:
        table.add_column(heading.replace("_", " "), justify="right")
    for label, runs in by_label(results).items():
        table.add_row(
            label,
            f"{runs[0].trainable_parameters:,}",
            f"{runs[0].adapter_bytes:,}",
            _spread([run.training_loss for run in runs], 3),
            _spread([run.validation_loss for run in runs], 3),
            *(_spread([run.metrics.get(name) for run in runs], 2) for name in names),
            _spread([run.seconds for run in runs], 1),
        )
    return table


def plot_losses(results: Sequence[RunResult], path: Path) -> None:
    """Training and validation loss against the step, one colour a method, a faint line for every seed.

    Args:
        results: All runs; the one without a training curve is the untrained model, where all validation curves start.
        path: The PNG file.
    """
    untrained, groups = None, {}
    for label, runs in by_label(results).items():
        if runs[0].training_curve:
            groups[label] = runs
        else:
            untrained = runs[0]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, kind in zip(axes, ("training", "validation")):
        for colour, (label, runs) in zip(_COLOURS * len(groups), groups.items()):
            curves = [getattr(run, f"{kind}_curve") for run in runs]
            if kind == "validation" and untrained is not None and untrained.validation_loss is not None:
                curves = [[(0, untrained.validation_loss), *curve] for curve in curves]
            for curve in curves:
                axis.plot(*zip(*curve), color=colour, alpha=1 if len(curves) == 1 else 0.3, linewidth=1.2)
            if len(curves) > 1:
                steps = [step for step, _ in curves[0]]
                means = [mean(losses) for losses in zip(*([loss for _, loss in curve] for curve in curves))]
                axis.plot(steps[: len(means)], means, color=colour, linewidth=1.8)
            axis.plot([], [], color=colour, linewidth=1.8, label=label)
        axis.set_title(f"{kind.capitalize()} loss", loc="left", fontsize=11)
        axis.set_xlabel("step")
        axis.grid(axis="y", color="0.9", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(left=0)
        # Most of the fall is in the first steps; a logarithmic axis leaves room for the differences after it.
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_locator(NullLocator())
    axes[0].set_ylabel("loss per target token")
    axes[1].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_report(results: Sequence[RunResult], folder: Path, samples: str) -> None:
    """Write ``results.json``, ``results.md`` and ``loss.png``, and print the table and the samples.

    Args:
        results: All runs, the untrained model first.
        folder: Where to.
        samples: Markdown with some outputs side by side.
    """
    rows = [dataclasses.asdict(result) for result in results]
    (folder / "results.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    with (folder / "results.md").open("w", encoding="utf-8") as file:
        Console(file=file, width=200).print(results_table(results, box.MARKDOWN))
        file.write(f"\n{samples}")
    plot_losses(results, folder / "loss.png")
    console = Console()
    # A pipe has no width of its own; the table must not be cut to 80 columns there.
    console = console if console.is_terminal else Console(width=160)
    console.print(results_table(results))
    console.print(samples, markup=False, highlight=False, soft_wrap=True)
    console.print(f"results.json, results.md and loss.png are in {folder}", highlight=False, soft_wrap=True)
