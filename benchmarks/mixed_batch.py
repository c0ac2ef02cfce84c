"""Batches in which every row has an adapter of its own: our methods beside PEFT's LoRA.

Each method is timed in turn with itself: a batch whose rows have an adapter each, and the same batch with one adapter
for all. The table shows medians of the ratios of the pairs; the last column compares the mixed batches of the methods.

    python -m benchmarks.mixed_batch                    # a random Llama of the size of SmolLM2-135M
    python -m benchmarks.mixed_batch --model_name_or_path <folder> --gguf_file <file> --output mixed_batch.jsonl
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import HfArgumentParser, LogitsProcessorList

import peft_ext

from . import lines
from .models import ModelArguments, load_model

BASELINE = "LoRA r=8"


def methods(targets: list[str]) -> dict[str, Callable[[int], peft.PeftConfig]]:
    """The methods compared, by name; a configuration for each number of the adapter."""
    return {
        BASELINE: lambda _: peft.LoraConfig(r=8, init_lora_weights=False, target_modules=targets),
        "NOLA r=8, 256 bases": lambda _: peft_ext.NolaConfig(init_weights=False, target_modules=targets),
        "NOLA r=8, 256 bases, a seed each": lambda number: peft_ext.NolaConfig(
            init_weights=False, seed=number, target_modules=targets
        ),
        "MCNC r=8": lambda _: peft_ext.McncConfig(init_weights=False, target_modules=targets),
        "PRANC on factors, 10000 coefficients": lambda _: peft_ext.PrancConfig(
            init_weights=False, apply_to="factors", target_modules=targets
        ),
        "PRANC, 10000 coefficients": lambda _: peft_ext.PrancConfig(init_weights=False, target_modules=targets),
    }


@dataclass
class Arguments(ModelArguments):
    method: list[str] = field(
        default_factory=list, metadata={"help": "Parts of the names of the methods to time; all by default."}
    )
    rows: int = field(default=32, metadata={"help": "Rows in a batch, and adapters."})
    prompt_tokens: int = field(default=32, metadata={"help": "Tokens of a row that are read at once."})
    new_tokens: int = field(default=16, metadata={"help": "Tokens of a row that are then made one by one."})
    pairs: int = field(default=5, metadata={"help": "Pairs of measurements."})
    output: str = field(default="", metadata={"help": "JSON lines that the figures are added to."})


class Runner:
    """A model with an adapter for each row."""

    def __init__(self, arguments: Arguments, config: Callable[[int], peft.PeftConfig]) -> None:
        self.arguments = arguments
        self.names = [f"a{number}" for number in range(arguments.rows)]
        model = peft.get_peft_model(load_model(arguments), config(0), adapter_name=self.names[0])
        for number, name in enumerate(self.names[1:], 1):
            model.add_adapter(name, config(number))
        self.model = model.eval()
        self.batch = torch.randint(10, 40000, (arguments.rows, arguments.prompt_tokens))

    def seconds(self, mixed: bool) -> dict[str, float]:
        """How long the prompts take, and a token of every row after the first (the median)."""
        stamps: list[float] = []

        def stamp(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            stamps.append(time.perf_counter())
            return scores

        names = {"adapter_names": self.names} if mixed else {}
        tokens, start = 1 + self.arguments.new_tokens, time.perf_counter()
        self.model.generate(
            input_ids=self.batch, attention_mask=torch.ones_like(self.batch), max_new_tokens=tokens,
            min_new_tokens=tokens, do_sample=False, pad_token_id=0, logits_processor=LogitsProcessorList([stamp]),
            **names,
        )  # fmt: skip
        steps = [after - before for before, after in zip(stamps, stamps[1:])]
        return {"prefill": stamps[0] - start, "decode": statistics.median(steps)}


def compare(runner: Runner, baseline: Runner, pairs: int) -> dict[str, float]:
    """Medians of a method's mixed batch, and its ratios to one adapter and to the baseline's mixed batch."""
    found: dict[str, list[float]] = {}
    first = runner.seconds(True)["prefill"]
    baseline.seconds(True)
    for pair in range(pairs):
        runs = {
            "one": lambda: runner.seconds(False), "mixed": lambda: runner.seconds(True),
            "lora": lambda: baseline.seconds(True),
        }  # fmt: skip
        order = list(runs) if pair % 2 else list(runs)[::-1]
        seconds = {name: runs[name]() for name in order}
        for phase, value in seconds["mixed"].items():
            found.setdefault(f"{phase}_seconds", []).append(value)
            found.setdefault(f"{phase}_ratio", []).append(value / seconds["one"][phase])
            found.setdefault(f"{phase}_to_lora", []).append(value / seconds["lora"][phase])
    return {"first_seconds": first, **{name: statistics.median(values) for name, values in found.items()}}


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    known = methods(arguments.target_modules)
    chosen = [name for name in known if not arguments.method or any(part in name for part in arguments.method)]
    baseline = Runner(arguments, known[BASELINE])
    rows: list[dict[str, Any]] = []
    for name in track(chosen, "Timing", console=Console(stderr=True)):
        runner = baseline if name == BASELINE else Runner(arguments, known[name])
        rows.append({"method": name, **compare(runner, baseline, arguments.pairs)})

    title = f"{arguments.rows} rows with an adapter each, relative to one adapter, and to {BASELINE} with as many"
    table = Table(title=title)
    headings = (
        "prefill (s)",
        "to one adapter",
        "to LoRA",
        "a token (ms)",
        "to one adapter",
        "to LoRA",
        "first batch (s)",
    )
    table.add_column("method")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["method"], f"{row['prefill_seconds']:.2f}", f"{row['prefill_ratio']:.2f}",
            f"{row['prefill_to_lora']:.2f}", f"{1000 * row['decode_seconds']:.0f}", f"{row['decode_ratio']:.2f}",
            f"{row['decode_to_lora']:.2f}", f"{row['first_seconds']:.2f}",
        )  # fmt: skip
    Console(width=140).print(table)
    if arguments.output:
        facts = {"rows": arguments.rows, **lines.provenance(lines.command("mixed_batch", sys.argv[1:]))}
        for row in rows:
            lines.append(Path(arguments.output), {**row, **facts})


if __name__ == "__main__":
    main()
