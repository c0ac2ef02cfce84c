"""Time of a training step and of generation, wrapping, loading, memory and file size: our methods beside PEFT's own.

Every method is timed in turn with LoRA r=8 on the same batch, step by step, and the table shows the median of the
ratios of the pairs with their quartiles: a machine that slows down for a while slows both. Ratios of processor time are
beside them, for machines that do other work.

    python -m benchmarks.step_time                      # a random Llama of the size of SmolLM2-135M
    python -m benchmarks.step_time --model_name_or_path <folder> --gguf_file <file> --output step_time.jsonl

A method whose line is in the output is not measured again, so an interrupted program goes on where it was.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import HfArgumentParser

import peft_ext
from recipes.support.arguments import UserError, run_main
from recipes.support.usage import Usage

from . import lines
from .models import ModelArguments, generator_bytes, load_model
from .timing import check_pairs, compare, ratio_cell

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
        "PRANC on factors, 10000 coefficients": lambda: peft_ext.PrancConfig(
            num_coefficients=10_000, apply_to="factors", target_modules=targets
        ),
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
    pairs: int = field(default=7, metadata={"help": "Pairs of training steps."})
    generation_pairs: int = field(default=7, metadata={"help": "Pairs of generations."})
    new_tokens: int = field(default=16, metadata={"help": "Tokens to generate."})
    device: str = field(default="cpu", metadata={"help": "Where to run."})
    output: str = field(default="", metadata={"help": "JSON lines file that the figures are added to."})

    @property
    def budget(self) -> dict[str, Any]:
        """What figures must have in common to be compared."""
        names = ("device", "batch_size", "sequence_length", "pairs", "generation_pairs", "new_tokens", "target_modules")
        model = Path(self.gguf_file or self.model_name_or_path).name or "random, of the size of SmolLM2-135M"
        return {"model": model, **{name: getattr(self, name) for name in names}, "threads": torch.get_num_threads()}


class Runner:
    """A wrapped model that can be timed."""

    def __init__(self, arguments: Arguments, config: peft.PeftConfig) -> None:
        self.arguments = arguments
        model = load_model(arguments).to(arguments.device)
        shape = (arguments.batch_size, arguments.sequence_length)
        numbers = torch.Generator().manual_seed(0)
        self.batch = torch.randint(10, model.config.vocab_size, shape, generator=numbers).to(arguments.device)
        with Usage(torch.device(arguments.device)) as usage:
            start = time.perf_counter()
            self.model = peft.get_peft_model(model, config)
            self.wrap_seconds = time.perf_counter() - start
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
            for _ in range(2):  # the second has what the optimizer keeps since the first
                self.train()
        self.peak_bytes = usage.peak_memory
        self.trainable = sum(parameter.numel() for parameter in trained)

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
        return sum(own.values()) + generator_bytes(self.model)

    def saved(self) -> tuple[int, float]:
        """Bytes of the saved adapter, and seconds to load it into a base model that is there."""
        base = load_model(self.arguments)
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            size = os.path.getsize(os.path.join(folder, "adapter_model.safetensors"))
            start = time.perf_counter()
            peft.PeftModel.from_pretrained(base, folder)
            return size, time.perf_counter() - start


def measure(arguments: Arguments, baseline: Runner, config: peft.PeftConfig) -> dict[str, Any]:
    """The figures of one method."""
    candidate = Runner(arguments, config)
    row = {
        "trainable": candidate.trainable,
        "frozen_bytes": candidate.frozen_bytes(),
        "peak_bytes": candidate.peak_bytes,
        "wrap_seconds": candidate.wrap_seconds,
        **compare("step", baseline.train, candidate.train, arguments.pairs),
        **compare("generation", baseline.generate, candidate.generate, arguments.generation_pairs),
    }
    if candidate.peak_bytes is not None and baseline.peak_bytes:
        row["peak_ratio"] = candidate.peak_bytes / baseline.peak_bytes
    size, load_seconds = candidate.saved()
    return {**row, "saved_bytes": size, "load_seconds": load_seconds}


def tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """Returns a table of the lines of each budget, the last line of each method."""
    found, budgets = [], []
    for row in rows:
        budgets += [row["budget"]] if row["budget"] not in budgets else []
    for budget in budgets:
        setting = ", ".join(f"{name} {value}" for name, value in budget.items())
        table = Table(title=f"Relative to {BASELINE}: median (quartiles) of pairs", caption=setting)
        headings = (
            "method", "trainable", "file (bytes)", "frozen (MB)", "peak", "wrap (s)", "load (s)", "step (s)",
            "step ratio", "processor time", "generate (s)", "generate ratio", "processor time",
        )  # fmt: skip
        for heading in headings:
            table.add_column(heading, justify="left" if heading == "method" else "right")
        for name, row in {row["method"]: row for row in rows if row["budget"] == budget}.items():
            table.add_row(
                name, f"{row['trainable']:,}", f"{row['saved_bytes']:,}", f"{row['frozen_bytes'] / 1e6:.1f}",
                f"{row['peak_ratio']:.2f}" if "peak_ratio" in row else "-", f"{row['wrap_seconds']:.2f}",
                f"{row['load_seconds']:.2f}", f"{row['step_seconds']:.3f}", ratio_cell(row, "step_ratio"),
                ratio_cell(row, "step_processor_ratio"), f"{row['generation_seconds']:.2f}",
                ratio_cell(row, "generation_ratio"), ratio_cell(row, "generation_processor_ratio"),
            )  # fmt: skip
        found.append(table)
    return found


def main(argv: Sequence[str]) -> None:
    """Measures what is not in the output yet."""
    parser = HfArgumentParser(Arguments, prog="python -m benchmarks run step_time")  # type: ignore[arg-type]
    (arguments,) = parser.parse_args_into_dataclasses(list(argv))
    check_pairs("pairs", arguments.pairs)
    check_pairs("generation_pairs", arguments.generation_pairs)
    known = methods(arguments.target_modules)
    chosen = [name for name in known if not arguments.method or any(part in name for part in arguments.method)]
    if not chosen:
        raise UserError(f"method: no name has any of {', '.join(arguments.method)}; there are {'; '.join(known)}")
    rows, baseline = [], None
    for name in track(chosen, "Timing", console=Console(stderr=True)):
        identity = {"method": name, "budget": arguments.budget}
        row = lines.find(Path(arguments.output), identity) if arguments.output else None
        if row is None:
            baseline = baseline or Runner(arguments, known[BASELINE]())
            found = measure(arguments, baseline, known[name]())
            row = {**identity, **found, **lines.provenance(lines.command("step_time", argv))}
            if arguments.output:
                lines.append(Path(arguments.output), row)
        rows.append(row)
    for table in tables(rows):
        Console(width=240).print(table)


if __name__ == "__main__":
    run_main(main)
