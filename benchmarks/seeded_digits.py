"""Accuracy of whole networks from a seed: an MLP of 26,122 weights that learns digits from 100 and 400 coefficients.

Every method is trained with four learning rates and three seeds, and the table shows test accuracy, mean and standard
deviation over the seeds, of the learning rate that is best in the mean: a comparison of methods, which flatters all.

    python -m benchmarks.seeded_digits --output digits.json      # about ten minutes on one core
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from transformers import HfArgumentParser

from peft_ext import McncConfig, PrancConfig, SeededNetwork

Config = PrancConfig | McncConfig
LEARNING_RATES = (0.01, 0.03, 0.1, 0.3)
SIZES = {100: 2700, 400: 660}  # coefficients: chunk size of MCNC with k=9


@dataclass
class Arguments:
    steps: int = field(default=400, metadata={"help": "Training steps of 128 images."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of network and data order."})
    output: str = field(default="", metadata={"help": "JSON file for the figures."})


def methods(coefficients: int, d: int) -> dict[str, Callable[[int], Config]]:
    """The methods compared, by name: configurations for a seed."""

    def pranc(**options: object) -> Callable[[int], Config]:
        return lambda seed: PrancConfig(num_coefficients=coefficients, seed=seed, **options)  # type: ignore[arg-type]

    def mcnc(**options: object) -> Callable[[int], Config]:
        fixed = {"apply_to": "weight", "k": 9, "d": d, "widths": (256,)}
        return lambda seed: McncConfig(seed=seed, **{**fixed, **options})  # type: ignore[arg-type]

    return {
        "PRANC, sparse": pranc(),
        "PRANC, sparse, 4 a weight": pranc(nnz=4),
        "PRANC, dense": pranc(basis="dense"),
        "MCNC, sine, frequency 1": mcnc(frequency=1.0),
        "MCNC, sine, frequency 5": mcnc(),
        "MCNC, sine, frequency 10": mcnc(frequency=10.0),
        "MCNC, sine, not normalised": mcnc(normalize=False),
        "MCNC, relu": mcnc(activation="relu"),
        "MCNC, tanh": mcnc(activation="tanh"),
        "MCNC, none": mcnc(activation="none"),
    }


def accuracy(data: list[torch.Tensor], config: Config, learning_rate: float, steps: int) -> float:
    """Percent of the test images that are told right after training."""
    train_x, test_x, train_y, test_y = data
    torch.manual_seed(config.seed)
    layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    network = SeededNetwork(layers, config, keep_basis=True)
    optimizer = torch.optim.Adam(network.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        batch = torch.randint(0, len(train_x), (128,))
        nn.functional.cross_entropy(network(train_x[batch]), train_y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        return 100 * (network(test_x).argmax(1) == test_y).double().mean().item()


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(torch.tensor(pixels / 16).float(), torch.tensor(labels), test_size=500, random_state=0)
    runs = [(size, name) for size, d in SIZES.items() for name in methods(size, d)]
    rows: dict[str, dict[int, dict[str, float]]] = {}
    for size, name in track(runs, "Training", console=Console(stderr=True)):
        make = methods(size, SIZES[size])[name]
        found = []
        for learning_rate in LEARNING_RATES:
            values = [accuracy(parts, make(seed), learning_rate, arguments.steps) for seed in arguments.seeds]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            found.append({"mean": statistics.mean(values), "spread": spread, "learning_rate": learning_rate})
        rows.setdefault(name, {})[size] = max(found, key=lambda result: result["mean"])

    table = Table(title=f"Test accuracy after {arguments.steps} steps, {len(arguments.seeds)} seeds")
    table.add_column("method")
    for size in SIZES:
        table.add_column(f"{size} coefficients", justify="right")
        table.add_column("learning rate", justify="right")
    for name, results in rows.items():
        cells = [(f"{r['mean']:.1f} ± {r['spread']:.1f}", f"{r['learning_rate']:g}") for r in results.values()]
        table.add_row(name, *(cell for pair in cells for cell in pair))
    Console(width=120).print(table)
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
