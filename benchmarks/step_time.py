"""Time of a training step and of generation, wrapping, loading, memory and file size: our methods beside PEFT's own.

Every method is timed in turn with LoRA r=8 on the same batch, step by step, and the table shows the median of the
ratios of the pairs with their quartiles: a machine that slows down for a while slows both.

    python -m benchmarks.step_time                      # a random Llama of the size of SmolLM2-135M
    python -m benchmarks.step_time --model_name_or_path <folder> --gguf_file <file> --output step_time.jsonl
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import HfArgumentParser

import peft_ext
from peft_ext.tuners.layers import SeededLayer

from .lines import append, provenance
from .models import ModelArguments, load_model

BASELINE = "LoRA r=8"


def methods(targets: list[str]) -> dict[str, Callable[[], peft.PeftConfig]]:
    """The methods compared: on the query and value projections, VeRA and RandLoRA where shapes are equal."""
    query = targets[:1]
    return {
        BASELINE: lambda: peft.LoraConfig(r=8, target_modules=targets),
        "LoRA r=1": lambda: peft.LoraConfig(r=1, target_modules=targets),
        "VeRA r=256 (query only)": lambda: peft.VeraConfig(r=256, target_modules=query),
        "VB-LoRA": lambda: peft.VBLoRAConfig(r=4, num_vectors=64, vector_length=64, target_modules=targets),
        "UniLoRA": lambda: peft.UniLoraConfig(r=8, theta_d_length=15360, target_modules=targets),
        "FourierFT n=256": lambda: peft.FourierFTConfig(n_frequency=256, target_modules=targets),
        "RandLoRA r=32 (query only)": lambda: peft.RandLoraConfig(r=32, target_modules=query),
        "NOLA r=8, 256 bases": lambda: peft_ext.NolaConfig(r=8, num_basis=256, target_modules=targets),
        "NOLA r=8, 1024 bases": lambda: peft_ext.NolaConfig(r=8, num_basis=1024, target_modules=targets),
        "PRANC, 10000 coefficients": lambda: peft_ext.PrancConfig(num_coefficients=10_000, target_modules=targets),
        "PRANC dense, 10 coefficients": lambda: peft_ext.PrancConfig(
            num_coefficients=10, basis="dense", target_modules=targets
        ),
        "MCNC r=8": lambda: peft_ext.McncConfig(r=8, target_modules=targets),
        "MCNC weights": lambda: peft_ext.McncConfig(apply_to="weight", target_modules=targets),
        "NOLA r=8, 256 bases, a basis per layer": lambda: peft_ext.NolaConfig(
            r=8, num_basis=256, share_basis=False, target_modules=targets
        ),
    }


@dataclass
class Arguments(ModelArguments):
    method: list[str] = field(
        default_factory=list, metadata={"help": "Parts of the names of the methods to time; all by default."}
    )
    batch_size: int = field(default=2, metadata={"help": "Sequences in a batch."})
    sequence_length: int = field(default=64, metadata={"help": "Tokens in a sequence."})
    pairs: int = field(default=15, metadata={"help": "Pairs of training steps."})
    generation_pairs: int = field(default=5, metadata={"help": "Pairs of generations."})
    new_tokens: int = field(default=64, metadata={"help": "Tokens to generate."})
    device: str = field(default="cpu", metadata={"help": "Where to run."})
    output: str = field(default="", metadata={"help": "JSON lines file that the figures are added to."})


class Runner:
    """A wrapped model that can be timed."""

    def __init__(self, arguments: Arguments, config: peft.PeftConfig) -> None:
        self.arguments = arguments
        model = load_model(arguments)
        start = time.perf_counter()
        self.model = peft.get_peft_model(model, config)
        self.wrap_seconds = time.perf_counter() - start
        self.model.to(arguments.device)
        generator = torch.Generator().manual_seed(0)
        shape = (arguments.batch_size, arguments.sequence_length)
        self.batch = torch.randint(10, 40000, shape, generator=generator).to(arguments.device)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.trainable = sum(parameter.numel() for parameter in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def timed(self, work: Callable[[], None]) -> float:
        self._synchronize()
        start = time.perf_counter()
        work()
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.arguments.device.startswith("cuda"):
            torch.cuda.synchronize()

    def step_seconds(self) -> float:
        return self.timed(self.train)

    def generation_seconds(self) -> float:
        return self.timed(self.generate)

    def train(self) -> None:
        self.model.train()
        self.model(input_ids=self.batch, labels=self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def generate(self) -> None:
        self.model.eval()
        tokens = self.arguments.new_tokens
        self.model.generate(
            input_ids=self.batch[:1, :16], attention_mask=torch.ones_like(self.batch[:1, :16]),
            max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0,
        )  # fmt: skip

    def frozen_bytes(self) -> int:
        """Memory of what the adapter adds and does not train."""
        adapter = str(self.model.base_model.prefix)
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        own = {id(tensor): tensor.nbytes for name, tensor in tensors if adapter in name and not tensor.requires_grad}
        bases = {
            id(tensor): tensor.nbytes
            for layer in self.model.modules()
            if isinstance(layer, SeededLayer)
            for expansions in layer.expansions.values()
            for expansion in expansions
            for tensor in expansion.generator.frozen
        }
        return sum(own.values()) + sum(bases.values())

    def saved(self) -> tuple[int, float]:
        """Bytes of the saved adapter, and seconds to load it into a base model that is there."""
        base = load_model(self.arguments)
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            size = os.path.getsize(os.path.join(folder, "adapter_model.safetensors"))
            start = time.perf_counter()
            peft.PeftModel.from_pretrained(base, folder)
            return size, time.perf_counter() - start


def paired(baseline: Callable[[], float], candidate: Callable[[], float], pairs: int) -> tuple[float, list[float]]:
    """(median of the candidate, ratios to the baseline) of two measurements in turn, after a warm-up pair."""
    found, ratios = [], []
    for pair in range(pairs + 1):
        order = (0, 1) if pair % 2 else (1, 0)
        values = {which: (baseline, candidate)[which]() for which in order}
        if pair:
            found.append(values[1])
            ratios.append(values[1] / values[0])
    return statistics.median(found), ratios


def quartiles(ratios: list[float]) -> list[float]:
    """The first quartile, the median and the third quartile."""
    return [float(value) for value in np.percentile(ratios, (25, 50, 75))]


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    console = Console(width=190)
    known = methods(arguments.target_modules)
    chosen = [name for name in known if not arguments.method or any(part in name for part in arguments.method)]
    baseline = Runner(arguments, known[BASELINE]())
    rows: dict[str, dict[str, Any]] = {}
    for name in track(chosen, "Timing", console=Console(stderr=True)):
        candidate = Runner(arguments, known[name]())
        step, step_ratios = paired(baseline.step_seconds, candidate.step_seconds, arguments.pairs)
        generation, generation_ratios = paired(
            baseline.generation_seconds, candidate.generation_seconds, arguments.generation_pairs
        )
        size, load_seconds = candidate.saved()
        step_quartiles, generation_quartiles = quartiles(step_ratios), quartiles(generation_ratios)
        rows[name] = {
            "trainable": candidate.trainable,
            "saved_bytes": size,
            "frozen_bytes": candidate.frozen_bytes(),
            "wrap_seconds": candidate.wrap_seconds,
            "load_seconds": load_seconds,
            "step_seconds": step,
            "step_ratio": step_quartiles[1],
            "step_ratio_quartiles": step_quartiles[::2],
            "generation_seconds": generation,
            "generation_ratio": generation_quartiles[1],
            "generation_ratio_quartiles": generation_quartiles[::2],
        }

    table = Table(title=f"Relative to {BASELINE}, median of {arguments.pairs} pairs of steps")
    for heading in ("method", "trainable", "file (bytes)", "frozen (MB)", "wrap (s)", "load (s)", "step (s)"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for heading in ("step ratio (quartiles)", "generate (s)", "generate ratio (quartiles)"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        table.add_row(
            name, f"{row['trainable']:,}", f"{row['saved_bytes']:,}", f"{row['frozen_bytes'] / 1e6:.1f}",
            f"{row['wrap_seconds']:.2f}", f"{row['load_seconds']:.2f}", f"{row['step_seconds']:.3f}",
            ratio_cell(row, "step"), f"{row['generation_seconds']:.2f}", ratio_cell(row, "generation"),
        )  # fmt: skip
    console.print(table)
    if arguments.output:
        setting = {"device": arguments.device, "batch_size": arguments.batch_size, "pairs": arguments.pairs}
        for name, row in rows.items():
            command = ["python", "-m", "benchmarks", "run", "step_time", *sys.argv[1:]]
            append(Path(arguments.output), {"method": name, **row, **setting, **provenance(command)})


def ratio_cell(row: dict[str, Any], what: str) -> str:
    """A median ratio with its quartiles as text."""
    low, high = row[f"{what}_ratio_quartiles"]
    return f"{row[f'{what}_ratio']:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
