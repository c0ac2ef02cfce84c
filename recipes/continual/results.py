"""What learning tasks in turn leaves behind: accuracies after every task, tables, and a plot of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean

import numpy as np
from rich import box
from rich.table import Table

from peft_ext.files import write_whole
from peft_ext.presentation import spread
from recipes.support.reporting import by_label, plt, write_files

_FILE = "result.json"
_COLUMNS = 3  # of the plot


@dataclass
class TurnResult:
    """One learner that has learned all tasks once.

    Attributes:
        label: the learner's label.
        seed: the run's seed.
        tasks: names of the tasks, in the order in which they were learned.
        accuracy: in percent, after every task (rows) on every task (columns); None for tasks that are not learned yet,
            and where nothing was measured.
        protected: how many directions were protected after every task, where any are.
        parameters: how many numbers a model trains.
        seconds: time of all trainings and measurements.
    """

    label: str
    seed: int
    tasks: list[str]
    accuracy: list[list[float | None]] = field(default_factory=list)
    protected: list[int] = field(default_factory=list)
    parameters: int = 0
    seconds: float = 0.0

    def mean_accuracy(self, after: int) -> float | None:
        """Returns the mean accuracy on the tasks that are learned after one of them, counted from 0."""
        seen = [value for value in self.accuracy[after][: after + 1] if value is not None]
        return mean(seen) if len(seen) == after + 1 else None

    def backward_transfer(self, after: int) -> float | None:
        """Returns by how much the accuracy on earlier tasks has changed since each was learned, in points.

        The mean over the tasks before the given one, which counts from 0 (Lopez-Paz & Ranzato 2017, equation 3).
        """
        pairs = [(self.accuracy[after][task], self.accuracy[task][task]) for task in range(after)]
        changes = [now - then for now, then in pairs if now is not None and then is not None]
        return mean(changes) if changes and len(changes) == after else None

    def line(self) -> str:
        """Returns a sentence for the screen."""
        last = len(self.tasks) - 1
        accuracy, transfer = self.mean_accuracy(last), self.backward_transfer(last)
        said = "" if transfer is None else f", backward transfer {transfer:.1f} points"
        return f"{self.label}, seed {self.seed}: accuracy {accuracy:.1f} %{said}; {self.seconds:.1f} s"

    def save(self, folder: Path) -> None:
        """Writes the result into a folder as JSON, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / _FILE, json.dumps(dataclasses.asdict(self), indent=1))

    @classmethod
    def load(cls, folder: Path) -> TurnResult:
        """Returns what `save` wrote; raises a FileNotFoundError where nothing is."""
        return cls(**json.loads((folder / _FILE).read_text(encoding="utf-8")))


def tables(results: Sequence[TurnResult], style: box.Box = box.SIMPLE_HEAD) -> list[Table]:
    """Returns a table of the end, and one of accuracy and backward transfer after every task."""
    count = len(results[0].tasks)
    end, course = Table(box=style), Table(box=style)
    for heading in ("learner", "trained", "accuracy", "backward transfer", "protected", "seconds"):
        end.add_column(heading, justify="left" if heading == "learner" else "right")
    course.add_column("learner")
    for after in range(count):
        course.add_column(f"after {after + 1}", justify="right")
    for label, runs in by_label(results).items():
        end.add_row(
            label,
            f"{runs[0].parameters:,}",
            spread([run.mean_accuracy(count - 1) for run in runs], 1),
            spread([run.backward_transfer(count - 1) for run in runs], 1),
            spread([run.protected[-1] if any(run.protected) else None for run in runs], 0),
            spread([run.seconds for run in runs], 1),
        )
        for name, measure in (("", TurnResult.mean_accuracy), (", transfer", TurnResult.backward_transfer)):
            values = [spread([measure(run, after) for run in runs], 1) for after in range(count)]
            if any(value != "-" for value in values):
                course.add_row(f"{label}{name}", *values)
    return [end, course]


def plot_matrices(results: Sequence[TurnResult], path: Path) -> None:
    """Draws the accuracies after every task on every task, a matrix for every learner, means over runs.

    Args:
        results: all runs.
        path: the PNG file.
    """
    groups = by_label(results)
    tasks = results[0].tasks
    rows = -(-len(groups) // _COLUMNS)
    size = 0.6 * len(tasks) + 1.2
    figure, axes = plt.subplots(
        rows, _COLUMNS, figsize=(_COLUMNS * size, rows * size), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(groups) :]:
        axis.axis("off")
    for axis, (label, runs) in zip(axes.flat, groups.items()):
        every = np.array([run.accuracy for run in runs], dtype=np.float64)  # None becomes NaN
        values = every.mean(0)
        image = axis.imshow(values, vmin=0, vmax=100, cmap="cividis")
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                axis.text(
                    column, row, f"{value:.0f}", ha="center", va="center", color="w" if value < 60 else "k", fontsize=8
                )
        axis.set_title(label, loc="left", fontsize=10)
        axis.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right", fontsize=7)
        axis.set_yticks(range(len(tasks)), [f"after {i + 1}" for i in range(len(tasks))], fontsize=7)
        axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, shrink=0.6, label="accuracy in percent")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_report(results: Sequence[TurnResult], folder: Path, notes: str) -> list[str]:
    """Writes and prints what `write_files` does, with ``matrix.png``."""
    return write_files(
        results, folder, partial(tables, results), notes, {"matrix.png": partial(plot_matrices, results)}
    )
