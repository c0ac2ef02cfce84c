"""Time of a step and memory of the generators against the number of layers, their width, the rank and the bases.

    python -m benchmarks run scaling                    # up to a layer of a 7B model, 11008 x 4096
    python -m benchmarks report scaling

The model is a chain of linear layers, `hidden -> inner -> hidden -> ...`. One of its sizes grows, the others stay at
small values; a step is a forward and backward pass of 512 tokens and a step of AdamW. Every method is timed in turn
with LoRA of the same rank. Adds a line a point and method to `scaling.jsonl`; those that are there are not measured
again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import peft
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from transformers import HfArgumentParser

import peft_ext
from peft_ext.presentation import COLOURS, tidy
from recipes.support.arguments import UserError, hint, run_main

from . import lines
from .models import generator_bytes
from .timing import check_pairs, compare, ratio_cell

FILE = "scaling.jsonl"
WIDTHS = {256: 688, 512: 1376, 1024: 2752, 2048: 5504, 4096: 11008}
"""Inner sizes by hidden ones, in Llama's proportion."""


@dataclass(frozen=True)
class Point:
    """What is adapted, and with what rank and number of bases."""

    layers: int = 4
    hidden: int = 512
    rank: int = 8
    bases: int = 256


AXES = {
    "layers": [Point(layers=layers) for layers in (1, 4, 16, 48)],
    "hidden": [Point(layers=1, hidden=hidden) for hidden in WIDTHS],
    "rank": [Point(rank=rank) for rank in (1, 2, 8, 32)],
    "bases": [Point(bases=bases) for bases in (16, 64, 256, 1024)],
}
LABELS = {
    "layers": "layers",
    "hidden": "hidden size (one layer)",
    "rank": "rank",
    "bases": "bases (PRANC: coefficients / 8)",
}
BASELINE = "LoRA"
METHODS: dict[str, Callable[[Point, list[str]], peft.PeftConfig]] = {
    BASELINE: lambda point, targets: peft.LoraConfig(r=point.rank, target_modules=targets),
    "NOLA": lambda point, targets: peft_ext.NolaConfig(r=point.rank, num_basis=point.bases, target_modules=targets),
    "PRANC": lambda point, targets: peft_ext.PrancConfig(num_coefficients=8 * point.bases, target_modules=targets),
    "PRANC on factors": lambda point, targets: peft_ext.PrancConfig(
        num_coefficients=8 * point.bases, apply_to="factors", r=point.rank, target_modules=targets
    ),
    "MCNC": lambda point, targets: peft_ext.McncConfig(r=point.rank, target_modules=targets),
}
"""The methods compared; PRANC has as many coefficients as NOLA in four layers."""
_UNCHANGED = {("rank", "PRANC"), ("bases", "MCNC"), ("bases", BASELINE)}  # what an axis does not change


@dataclass
class Arguments:
    """What is measured."""

    axes: list[str] = field(default_factory=lambda: list(AXES), metadata={"help": f"Of {', '.join(AXES)}."})
    largest: int = field(default=4096, metadata={"help": "The largest hidden size."})
    tokens: int = field(default=512, metadata={"help": "Tokens in a step."})
    pairs: int = field(default=9, metadata={"help": "Pairs of steps."})
    output: str = field(default=str(lines.RESULTS), metadata={"help": "Folder of the file with the results."})


class Runner:
    """An adapted chain of linear layers."""

    def __init__(self, method: str, point: Point, tokens: int) -> None:
        torch.manual_seed(0)
        sizes = [(point.hidden, WIDTHS[point.hidden])[place % 2] for place in range(point.layers + 1)]
        chain = nn.Sequential(*(nn.Linear(*pair, bias=False) for pair in zip(sizes, sizes[1:])))
        targets = [name for name, _ in chain.named_children()]
        self.model: Any = peft.get_peft_model(chain, METHODS[method](point, targets))  # type: ignore[arg-type]
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.trainable = sum(parameter.numel() for parameter in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self.x = torch.randn(tokens, point.hidden, requires_grad=True)  # as if there were layers before

    def train(self) -> None:
        self.model(self.x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.x.grad = None


def points(arguments: Arguments) -> Iterator[tuple[str, Point, str]]:
    """What is measured: the axis, the point on it, the method."""
    for axis in arguments.axes:
        for point in AXES[axis]:
            if point.hidden <= arguments.largest:
                yield from ((axis, point, method) for method in METHODS if (axis, method) not in _UNCHANGED)


def measure(point: Point, method: str, arguments: Arguments) -> dict[str, Any]:
    """The figures of a method at a point."""
    baseline, candidate = (Runner(each, point, arguments.tokens) for each in (BASELINE, method))
    found = compare("step", baseline.train, candidate.train, arguments.pairs)
    return {"trainable": candidate.trainable, "generator_bytes": generator_bytes(candidate.model), **found}


def table(rows: Sequence[dict[str, Any]], budget: str = "") -> Table:
    """Returns a table of lines of one budget, which is named where there are others."""
    title = "A step of a chain of linear layers, beside LoRA of the same rank"
    found = Table(title=", ".join(filter(None, [title, budget])), title_justify="left")
    headings = ("grows", "method", "layers", "hidden", "rank", "bases", "trainable", "generators (MB)", "step (ms)")
    for heading in (*headings, "step ratio (quartiles)", "processor time"):
        found.add_column(heading, justify="left" if heading in ("grows", "method") else "right")
    for row in rows:
        found.add_row(
            row["axis"], row["method"], *(f"{row[name]:,}" for name in asdict(Point())), f"{row['trainable']:,}",
            f"{row['generator_bytes'] / 1e6:.1f}", f"{1000 * row['step_seconds']:.1f}", ratio_cell(row, "step_ratio"),
            ratio_cell(row, "step_processor_ratio"),
        )  # fmt: skip
    return found


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws ratios of step times with their quartiles (above) and memory (below) along every axis."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = [axis for axis in AXES if any(row["axis"] == axis for row in rows)]
    figure, panels = pyplot.subplots(2, len(axes), figsize=(1 + 2.8 * len(axes), 5), squeeze=False, sharex="col")
    for column, axis in enumerate(axes):
        of_axis = [row for row in rows if row["axis"] == axis]
        ratio, memory = panels[:, column]
        for method, colour in zip(METHODS, COLOURS):
            line = {row[axis]: row for row in of_axis if row["method"] == method}
            places = sorted(line)
            middle = [line[place]["step_ratio"] for place in places]
            spans = [
                [abs(line[place]["step_ratio_quartiles"][end] - line[place]["step_ratio"]) for place in places]
                for end in (0, 1)
            ]
            style: dict[str, Any] = {"color": colour, "markersize": 4, "label": method}
            ratio.errorbar(places, middle, yerr=spans, fmt="o-", capsize=2, **style)
            if method != BASELINE:  # LoRA generates nothing
                memory.plot(places, [line[place]["generator_bytes"] / 1e6 for place in places], "o-", **style)
        for panel, title in ((ratio, "step time, times LoRA's"), (memory, "MB of generators")):
            panel.set_xscale("log", base=2)
            tidy(panel, "both")
            if not column:
                panel.set_ylabel(title)
        ratio.set_ylim(bottom=0)
        memory.set_yscale("log")
        memory.yaxis.set_major_formatter("{x:g}")
        memory.set_xticks(sorted({row[axis] for row in of_axis}))
        memory.xaxis.set_major_formatter("{x:,.0f}")
        memory.tick_params(axis="x", labelsize=8, rotation=30)
        memory.set_xlabel(LABELS[axis])
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="upper center", ncols=len(METHODS), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: Sequence[str]) -> None:
    """Measures what is not in the file yet."""
    parser = HfArgumentParser(Arguments, prog="python -m benchmarks run scaling")  # type: ignore[arg-type]
    (arguments,) = parser.parse_args_into_dataclasses(list(argv))
    check_pairs("pairs", arguments.pairs)
    for axis in arguments.axes:
        if axis not in AXES:
            raise UserError(f"axes: there is no {axis!r}; there are {', '.join(AXES)}{hint(axis, AXES)}")
    path, rows = Path(arguments.output) / FILE, []
    budget = {"tokens": arguments.tokens, "pairs": arguments.pairs, "threads": torch.get_num_threads()}
    for axis, point, method in track(list(points(arguments)), "Timing", console=Console(stderr=True)):
        identity = {"axis": axis, "method": method, **asdict(point), "budget": budget}
        row = lines.find(path, identity)
        if row is None:
            found = measure(point, method, arguments)
            row = {**identity, **found, **lines.provenance(lines.command("scaling", argv))}
            lines.append(path, row)
        rows.append(row)
    Console(width=160).print(table(rows))


if __name__ == "__main__":
    run_main(main)
