"""A thousand adapters on one model: the pool beside PEFT's own way of holding NOLA and LoRA.

Every row of the table is measured in a process of its own: seconds to load saved adapters, how much the process grows
for each, seconds to switch, and a batch whose 32 rows ask for adapters by name.

    python -m benchmarks.many_adapters                  # a random Llama of the size of SmolLM2-135M
    python -m benchmarks.many_adapters --model_name_or_path <folder> --gguf_file <file> --output many_adapters.jsonl
"""

from __future__ import annotations

import dataclasses
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import peft
import psutil
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import HfArgumentParser

import peft_ext
from peft_ext.presentation import COLOURS, tidy

from . import lines
from .models import ModelArguments, load_model

WAYS = {
    "pool": "NOLA in a pool",
    "nola": "NOLA through PEFT",
    "lora": "LoRA r=8 through PEFT",
}


LABELS = {"pool": "NOLA,\na pool", "nola": "NOLA,\nPEFT", "lora": "LoRA r=8,\nPEFT"}  # under the bars of a plot


@dataclass
class Arguments(ModelArguments):
    pooled: int = field(default=1000, metadata={"help": "Adapters in the pool."})
    beside: int = field(default=100, metadata={"help": "Adapters that PEFT holds, of NOLA and of LoRA."})
    switches: int = field(default=100, metadata={"help": "Switches that are timed."})
    rows: int = field(default=32, metadata={"help": "Rows of a batch, each with an adapter of its own."})
    output: str = field(default="", metadata={"help": "JSON lines that the figures are added to."})
    plot: str = field(default="", metadata={"help": "PNG file for a plot."})
    way: str = field(default="", metadata={"help": "Measures one row and prints it as JSON: 'pool', 'nola' or 'lora'."})


def save(arguments: Arguments, way: str, folder: Path) -> dict[str, Path]:
    """Adapters with random numbers in a folder each, by name."""
    targets = arguments.target_modules
    config: peft.PeftConfig = (
        peft.LoraConfig(r=8, target_modules=targets) if way == "lora" else peft_ext.NolaConfig(target_modules=targets)
    )
    model = peft.get_peft_model(load_model(arguments), config)
    places = {}
    for number in track(
        range(arguments.pooled if way == "pool" else arguments.beside), "Saving", console=Console(stderr=True)
    ):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.02)
        places[f"a{number}"] = folder / f"a{number}"
        model.save_pretrained(str(folder / f"a{number}"))
    return places


def measure(arguments: Arguments) -> dict[str, Any]:
    """One way of holding adapters."""
    way = arguments.way
    with tempfile.TemporaryDirectory() as folder:
        places = save(arguments, way, Path(folder))
        names = list(places)
        gc.collect()
        model = peft.PeftModel.from_pretrained(load_model(arguments), str(places[names[0]]), adapter_name=names[0])
        model.eval()
        x = torch.randint(10, 40000, (arguments.rows, 8))
        forward(model, x[:1])
        coefficients = sum(p.nbytes for name, p in model.named_parameters() if f".{names[0]}." in name)
        rest = {name: places[name] for name in names[1:]}
        gc.collect()
        before, start = psutil.Process().memory_info().rss, time.perf_counter()
        if way == "pool":
            pool = peft_ext.AdapterPool(model)
            pool.load(rest)
        else:
            for name, place in rest.items():
                model.load_adapter(str(place), name)
            model.eval()
        load_seconds = time.perf_counter() - start
        gc.collect()
        grown = psutil.Process().memory_info().rss - before
    chance = random.Random(0)
    switch, first = [], []
    for name in [chance.choice(names[1:]) for _ in range(arguments.switches)]:
        switch.append(timed(lambda name=name: model.set_adapter(name)))  # type: ignore[misc]
        first.append(timed(lambda: forward(model, x[:1, :1])))
    again = statistics.median(timed(lambda: forward(model, x[:1, :1])) for _ in range(10))
    used = psutil.Process().memory_info().rss - before
    chosen = chance.sample(names, min(arguments.rows, len(names)))
    mixed = timed(lambda: forward(model, x[: len(chosen)], chosen))
    return {
        "way": way,
        "adapters": len(names),
        "coefficient_bytes": coefficients,
        "load_seconds": load_seconds,
        "bytes_each": grown / len(rest),
        "relative_bytes": grown / len(rest) / coefficients,
        "bytes_each_after_use": used / len(rest),
        "switch_seconds": statistics.median(switch),
        "longest_switch_seconds": max(switch),
        "first_forward_seconds": statistics.median(first),
        "next_forward_seconds": again,
        "mixed_seconds": mixed,
    }


def forward(model: Any, x: torch.Tensor, names: list[str] | None = None) -> None:
    with torch.no_grad():
        model(x, **({} if names is None else {"adapter_names": names}))


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def plot(rows: list[dict[str, Any]], path: str) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3.2))
    shown = (
        (lambda row: 1000 * row["load_seconds"] / row["adapters"], "ms to load an adapter"),
        (lambda row: row["bytes_each_after_use"] / 1e6, "MB an adapter, after use"),
        (lambda row: 1000 * row["switch_seconds"], "ms to switch"),
    )
    for axis, (value, title) in zip(axes, shown):
        bars = axis.bar([LABELS[row["way"]] for row in rows], [value(row) for row in rows], color=COLOURS)
        axis.bar_label(bars, fmt="%.3g", padding=2)
        axis.set_title(title, fontsize=10)
        axis.margins(y=0.15)
        axis.tick_params(axis="x", labelsize=8)
        tidy(axis, "y")
    figure.suptitle(
        "Adapters held: " + ", ".join(f"{WAYS[row['way']]} {row['adapters']:,}" for row in rows), fontsize=9
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    if arguments.way:
        print(json.dumps(measure(arguments)))
        return
    rows = []
    for way in track(WAYS, "Measuring", console=Console(stderr=True)):
        options = dataclasses.asdict(dataclasses.replace(arguments, way=way, output="", plot=""))
        flags = [
            part
            for name, value in options.items()
            if value
            for part in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))
        ]
        command = [sys.executable, "-m", "benchmarks.many_adapters", *flags]
        run = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        rows.append(json.loads(run.stdout.splitlines()[-1]))

    table = Table(title=f"Adapters of {rows[0]['coefficient_bytes']:,} bytes (LoRA: {rows[-1]['coefficient_bytes']:,})")
    table.add_column("way")
    for heading in (
        "adapters",
        "load (s)",
        "bytes each",
        "of their parameters",
        "after use",
        "switch (ms)",
        "first pass (ms)",
        "next (ms)",
        "mixed batch (s)",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        milliseconds = (row[f"{what}_seconds"] for what in ("switch", "first_forward", "next_forward"))
        table.add_row(
            WAYS[row["way"]],
            f"{row['adapters']:,}",
            f"{row['load_seconds']:.1f}",
            f"{row['bytes_each']:,.0f}",
            f"{row['relative_bytes']:.2f}",
            f"{row['bytes_each_after_use']:,.0f}",
            *(f"{1000 * seconds:.2f}" for seconds in milliseconds),
            f"{row['mixed_seconds']:.2f}",
        )
    Console(width=160).print(table)
    if arguments.output:
        facts = lines.provenance(lines.command("many_adapters", sys.argv[1:]))
        for row in rows:
            lines.append(Path(arguments.output), {**row, **facts})
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
