"""What a federation leaves behind: accuracies after every round, bytes, a table and a plot of one against the other."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from rich import box
from rich.table import Table

from peft_ext.files import write_whole
from peft_ext.presentation import colours, spread, tidy
from recipes.support.reporting import by_label, plt, write_files

_FILE = "result.json"


@dataclass
class FederatedResult:
    """One training of all agents.

    Attributes:
        label: the method's label and the way.
        seed: the run's seed.
        parameters: how many numbers an agent trains.
        sent, received: bytes of numbers or outputs that an agent sends and receives in a round.
        accuracy: in percent on all test samples, after every round: that of the common model, or the mean over agents
            with models of their own. One figure, of the end, where nothing is exchanged.
        start: the accuracy of the common model before the first round.
        seconds: time of training and measuring.
    """

    label: str = ""
    seed: int = 0
    parameters: int = 0
    sent: int = 0
    received: int = 0
    accuracy: list[float] = field(default_factory=list)
    start: float | None = None
    seconds: float = 0.0

    def line(self) -> str:
        """Returns a sentence for the screen."""
        said = f", {self.sent:,} bytes sent by an agent a round" if self.sent else ""
        return f"{self.label}, seed {self.seed}: accuracy {self.accuracy[-1]:.1f} %{said}; {self.seconds:.1f} s"

    def save(self, folder: Path) -> None:
        """Writes the result into a folder as JSON, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / _FILE, json.dumps(dataclasses.asdict(self), indent=1))

    @classmethod
    def load(cls, folder: Path) -> FederatedResult:
        """Returns what `save` wrote; raises a FileNotFoundError where nothing is."""
        return cls(**json.loads((folder / _FILE).read_text(encoding="utf-8")))


def table(results: Sequence[FederatedResult], style: box.Box = box.SIMPLE_HEAD) -> Table:
    """Returns a row for every method and way: means and, over several runs, standard deviations."""
    rounds = max(len(result.accuracy) for result in results)
    found = Table(box=style)
    found.add_column("method")
    middle = -(-rounds // 4)
    headings = ["trained", "bytes sent a round", "received", "accuracy at first"]
    for heading in [*headings, f"after {middle}", f"after {rounds}", "seconds"]:
        found.add_column(heading, justify="right")
    for label, runs in by_label(results).items():
        whole = len(runs[0].accuracy) == rounds > 1 or rounds == 1
        found.add_row(
            label,
            f"{runs[0].parameters:,}",
            f"{runs[0].sent:,}" if runs[0].sent else "-",
            f"{runs[0].received:,}" if runs[0].received else "-",
            spread([run.start for run in runs], 1),
            spread([run.accuracy[middle - 1] if whole else None for run in runs], 1),
            spread([run.accuracy[-1] for run in runs], 1),
            spread([run.seconds for run in runs], 1),
        )
    return found


def plot(results: Sequence[FederatedResult], path: Path) -> None:
    """Draws accuracy against the bytes that an agent has sent and received, and lines for what exchanges nothing.

    Args:
        results: all runs.
        path: the PNG file.
    """
    groups = by_label(results)
    figure, axis = plt.subplots(figsize=(8.5, 4.2), layout="constrained")
    for colour, (label, runs) in zip(colours(len(groups)), groups.items()):
        every = np.array([run.accuracy for run in runs])
        a_round = runs[0].sent + runs[0].received
        if not a_round:
            axis.axhline(float(every[:, -1].mean()), color=colour, linestyle="--", linewidth=1.2, label=label)
            continue
        kilobytes = a_round * np.arange(1, every.shape[1] + 1) / 1000
        for curve in every if len(runs) > 1 else ():
            axis.plot(kilobytes, curve, color=colour, alpha=0.25, linewidth=1)
        axis.plot(kilobytes, every.mean(0), color=colour, linewidth=1.8, marker="o", markersize=2.5, label=label)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("kilobytes that an agent has sent and received")
    axis.set_ylabel("accuracy in percent")
    tidy(axis, "y")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_report(results: Sequence[FederatedResult], folder: Path, notes: str) -> list[str]:
    """Writes and prints what `write_files` does, with ``bytes.png``."""
    return write_files(
        results, folder, lambda style: [table(results, style)], notes, {"bytes.png": partial(plot, results)}
    )
