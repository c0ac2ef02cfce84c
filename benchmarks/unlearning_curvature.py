"""What a Gauss-Newton step of unlearning is worth when its curvature is estimated, on digits.

A small network with NOLA, trained on 300 digits, is to forget one of them. Every estimate of the curvature gives a
step; its value is the decrease that the exact quadratic model promises for it, relative to that of the exact step: 1 is
the best, below 0 the step leads uphill. Mean and standard deviation over seeds of data, network and probes.

    python -m benchmarks.unlearning_curvature --output curvature.json      # less than a minute on one core
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

from peft_ext import NolaConfig
from peft_ext.unlearning.derivatives.curvature import KernelForm
from peft_ext.unlearning.derivatives.function import AdapterFunction
from peft_ext.unlearning.derivatives.losses import LOSSES

IMAGES, FORGOTTEN = 300, 7
ESTIMATES = [("labels", draws) for draws in (1, 2, 3, 4, 8)] + [("signs", draws) for draws in (1, 2, 3, 4, 8)]


@dataclass
class Arguments:
    """What is measured."""

    dampings: list[float] = field(
        default_factory=lambda: [0.1, 1.0], metadata={"help": "In units of the mean of the exact curvature's diagonal."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "Of everything."})
    output: str = field(default="", metadata={"help": "JSON file for the figures."})


class Network(nn.Module):
    """An MLP with the arguments of an image classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.layers(pixel_values)


def rows(function: AdapterFunction, loader: DataLoader, draws: int | None) -> torch.Tensor:
    """Those of the curvature, the mean over the samples."""
    found = [part.rows for part in function.linearise(loader, draws)]
    return torch.cat(found).flatten(0, 1) / sum(map(len, found)) ** 0.5


def values(seed: int, dampings: list[float]) -> dict[tuple[str, int, float], float]:
    """Of the steps of all estimates: by estimator, draws and damping."""
    torch.manual_seed(seed)
    pixels, labels = load_digits(return_X_y=True)
    chosen = torch.randperm(len(labels))[:IMAGES].tolist()
    x, y = torch.tensor(pixels[chosen] / 16).float(), torch.tensor(labels[chosen])
    config = NolaConfig(target_modules=["0", "2", "4"], r=8, num_basis=128, alpha=8, seed=seed)
    model = get_peft_model(Network(), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(300):
        nn.functional.cross_entropy(model(pixel_values=x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    samples: Any = [{"pixel_values": a, "labels": b} for a, b in zip(x, y)]
    everything: Any = DataLoader(samples, 100)
    remaining: Any = [row for row in samples if row["labels"] != FORGOTTEN]
    retain: Any = DataLoader(remaining, 100)
    loss = LOSSES["cross_entropy"]()
    functions = {name: AdapterFunction(model, loss, estimator=name) for name in ("signs", "labels")}
    _, n, gradient = functions["signs"].loss_and_gradient(retain)
    _, n_all, gradient_all = functions["signs"].loss_and_gradient(everything)
    slope = gradient / n - gradient_all / n_all
    exact = KernelForm(rows(functions["signs"], retain, None))
    estimates = {(name, draws): KernelForm(rows(functions[name], retain, draws)) for name, draws in ESTIMATES}
    found = {}
    for damping in dampings:
        shift = damping * exact.mean

        def decrease(step: torch.Tensor, shift: float = shift) -> float:
            return -float(slope @ step + 0.5 * step @ (exact.product(step) + shift * step))

        best = decrease(-exact.solve(slope, shift))
        for (name, draws), estimate in estimates.items():
            found[name, draws, damping] = decrease(-estimate.solve(slope, shift)) / best
    return found


def main() -> None:
    """Measures and prints."""
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    runs = [values(seed, arguments.dampings) for seed in track(arguments.seeds, "Seeds", console=Console(stderr=True))]
    table = Table("estimator", "rows an image", title=f"Value of a step, {len(runs)} seeds")
    for damping in arguments.dampings:
        table.add_column(f"damping {damping:g}", justify="right")
    records = []
    for name, draws in ESTIMATES:
        cells = []
        for damping in arguments.dampings:
            each = [run[name, draws, damping] for run in runs]
            spread = statistics.stdev(each) if len(each) > 1 else 0.0
            cells.append(f"{statistics.mean(each):.2f} ± {spread:.2f}")
            records.append({"estimator": name, "draws": draws, "damping": damping, "values": each})
        table.add_row(name, str(draws), *cells)
    Console(width=100).print(table)
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            json.dump(records, file, indent=1)


if __name__ == "__main__":
    main()
