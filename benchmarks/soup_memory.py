"""Memory of making one adapter of many: a learned soup of saved ones beside a sum of adapters in the model.

    python -m benchmarks run soup_memory                # a random Llama of the size of SmolLM2-135M
    python -m benchmarks report soup_memory

Every figure is how far the memory of a process of its own grows at most, above what it has with the model loaded, while
one adapter is made of random ones: by `learn_soup` from a batch of one text, or by PEFT's `load_adapter` for each, a
pass with each, and `add_weighted_adapter`. Adds a line a process to `soup_memory.jsonl`; those that are there are not
measured again.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import peft
import psutil
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import HfArgumentParser

import peft_ext
from peft_ext.adapters.soup import learn_soup
from recipes.support.arguments import run_main

from . import lines
from .models import ModelArguments, load_model

FILE = "soup_memory.jsonl"
_MODEL = tuple(each.name for each in fields(ModelArguments))
WAYS = {"soup": "learned soup", "held": "all in the model"}
METHODS: dict[str, Any] = {
    "NOLA": lambda targets: peft_ext.NolaConfig(target_modules=targets),
    "LoRA r=8": lambda targets: peft.LoraConfig(r=8, target_modules=targets),
}


@dataclass
class Arguments(ModelArguments):
    """What is measured."""

    numbers: list[int] = field(default_factory=lambda: [2, 8, 32], metadata={"help": "Numbers of adapters."})
    output: str = field(default=str(lines.RESULTS), metadata={"help": "Folder of the file with the results."})
    way: str = field(default="", metadata={"help": "Measures one way, 'soup' or 'held', of the adapters in --places."})
    places: str = field(default="", metadata={"help": "Folder that holds the folders of the adapters."})


def save(args: Arguments, method: str, folder: Path) -> int:
    """Saves as many adapters with random numbers as are needed at most, and returns the bytes of the numbers of one."""
    model: Any = peft.get_peft_model(load_model(args), METHODS[method](args.target_modules))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for number in track(range(max(args.numbers)), f"Saving {method}", console=Console(stderr=True)):
        for parameter in trained:
            parameter.data.normal_(std=0.02)
        model.save_pretrained(str(folder / f"a{number}"))
    return sum(parameter.nbytes for parameter in trained)


def growth(args: Arguments) -> int:
    """Makes one adapter of the first ones in a folder, and returns by how many bytes this process grew at most."""
    (number,), folder = args.numbers, Path(args.places)
    places = [str(folder / f"a{index}") for index in range(number)]
    base, tokens = load_model(args), torch.arange(10, 42)[None]
    gc.collect()
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    if args.way == "soup":
        learn_soup(base, places, [{"input_ids": tokens, "labels": tokens}], epochs=1)
    else:
        names = [f"a{index}" for index in range(number)]
        model: Any = peft.PeftModel.from_pretrained(base, places[0], names[0])
        for name, place in zip(names[1:], places[1:]):
            model.load_adapter(place, name)
        for name in names:
            model.set_adapter(name)
            model(tokens, labels=tokens).loss.backward()
        model.add_weighted_adapter(names, [1 / number] * number, "sum", combination_type="linear")
    status = Path("/proc/self/status").read_text()
    (most,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * most - before


def tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """Returns a table of the lines of every model."""
    return [_table(group, model) for model, group in lines.apart(rows, *_MODEL).items()]


def _table(rows: Sequence[dict[str, Any]], model: str) -> Table:
    numbers = sorted({row["adapters"] for row in rows})
    title = "Memory (MB) that making one adapter of many takes at most"
    found = Table(title=", ".join(filter(None, [title, model])), title_justify="left")
    for heading in ("method", "way", "numbers of one (MB)", *(f"{number} adapters" for number in numbers)):
        found.add_column(heading, justify="left" if heading in ("method", "way") else "right")
    for method, way in dict.fromkeys((row["method"], row["way"]) for row in rows):
        of_way = [row for row in rows if (row["method"], row["way"]) == (method, way)]
        grown = {row["adapters"]: row["grown_bytes"] for row in of_way}
        cells = [f"{grown[number] / 1e6:,.0f}" if number in grown else "" for number in numbers]
        found.add_row(method, WAYS[way], f"{of_way[-1]['adapter_bytes'] / 1e6:.2f}", *cells)
    return found


def main(argv: Sequence[str]) -> None:
    """Measures what is not in the file yet."""
    parser = HfArgumentParser([Arguments], prog="python -m benchmarks run soup_memory")  # type: ignore[list-item]
    (args,) = parser.parse_args_into_dataclasses(list(argv))
    if args.way:
        print(json.dumps(growth(args)))
        return
    file, base = (
        Path(args.output) / FILE,
        asdict(ModelArguments(args.model_name_or_path, args.gguf_file, args.target_modules)),
    )
    base["model_name_or_path"] = Path(args.model_name_or_path).name
    for method in METHODS:
        missing = [
            {"method": method, "way": way, "adapters": number, **base} for way in WAYS for number in args.numbers
        ]
        missing = [identity for identity in missing if lines.find(file, identity) is None]
        if not missing:
            continue
        with tempfile.TemporaryDirectory() as folder:
            size = save(args, method, Path(folder))
            for identity in track(missing, f"Measuring {method}", console=Console(stderr=True)):
                given = ["--way", identity["way"], "--numbers", str(identity["adapters"]), "--places", folder]
                given += ["--target_modules", *args.target_modules]
                for name in ("model_name_or_path", "gguf_file"):
                    given += [f"--{name}", getattr(args, name)] if getattr(args, name) else []
                run = subprocess.run(
                    [sys.executable, "-m", "benchmarks.soup_memory", *given], stdout=subprocess.PIPE, check=True
                )
                found = {"adapter_bytes": size, "grown_bytes": json.loads(run.stdout.splitlines()[-1])}
                lines.append(file, {**identity, **found, **lines.provenance(lines.command("soup_memory", argv))})
    for table in tables(lines.read(file)):
        Console(width=160).print(table)


if __name__ == "__main__":
    run_main(main)
