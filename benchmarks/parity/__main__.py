"""Runs rows of the parity table and writes docs/parity.md.

    python -m benchmarks.parity                      all rows
    python -m benchmarks.parity --rows generate FSDP rows with one of these words in their title or group

The cells of the rows that are run replace those in benchmarks/results/parity.jsonl, from which the table is written.
Exits with status 1 if a cell of a method of ours is wrong.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import peft_ext

from .rows import METHODS, NOT_RUN, ROWS, WORKS, WRONG, run

for _module in ("saving", "several", "training", "places", "quantized", "libraries"):
    importlib.import_module(f"benchmarks.parity.{_module}")  # they fill ROWS, in this order

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "parity.jsonl"
DOCUMENT = ROOT / "docs" / "parity.md"
FAILS = "fails"  # what the table says of LoRA where PEFT itself is wrong

HEAD = """# What works as it does with LoRA

Every row was run on tiny models with LoRA and with NOLA, PRANC and MCNC, and compared with a value found in another
way: a model with the updates in its weights, the base model, the saved tensors. *works*: the values are equal.
*differs*: it works, and another way on purpose. *refused*: it ends in an error whose first words are in the note.
*fails*: PEFT's LoRA gives another value, or an error that refuses nothing. *not run*: the note says why.

{versions}. `python -m benchmarks.parity` runs the rows and writes this page.
"""


def stored() -> dict[tuple[str, str], dict[str, Any]]:
    """The cells in the results file by row and method, those of rows that the script still has."""
    if not RESULTS.exists():
        return {}
    cells = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    return {(each["row"], each["method"]): each for each in cells if each["row"] in ROWS}


def table(cells: dict[tuple[str, str], dict[str, Any]]) -> str:
    """The document."""
    versions: dict[str, str] = {}
    for cell in cells.values():
        versions.update(cell["versions"])
    lines = [HEAD.format(versions=", ".join(f"{name} {version}" for name, version in sorted(versions.items())))]
    notes: dict[str, int] = {}
    for group in dict.fromkeys(each.group for each in ROWS.values()):
        lines += [f"## {group}", "", f"| | {' | '.join(METHODS)} |", f"| --- |{' --- |' * len(METHODS)}"]
        for each in ROWS.values():
            if each.group != group:
                continue
            words = []
            for method in METHODS:
                cell = cells[each.title, method]
                status = FAILS if method == "LoRA" and cell["outcome"] == WRONG else cell["outcome"]
                number = notes.setdefault(cell["note"], len(notes) + 1) if cell["note"] else None
                words.append(status if number is None else f"{status} [{number}]")
            lines.append(f"| {each.title} | {' | '.join(words)} |")
        lines.append("")
    lines += ["## Notes", ""]
    lines += [f"{number}. {escaped(note)}" for note, number in notes.items()]
    return "\n".join(lines) + "\n"


def escaped(note: str) -> str:
    for mark in ("<", "*", "_", "|"):
        note = note.replace(mark, f"\\{mark}") if "`" not in note else note
    return note


def main(argv: list[str]) -> int:
    """Runs rows, writes results and, when every row has a result, the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description="Writes the parity table.")
    parser.add_argument("--rows", nargs="+", help="run rows with one of these words in title or group alone")
    chosen = parser.parse_args(argv).rows
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    versions = {each.__name__: each.__version__ for each in (torch, transformers, peft, peft_ext)}
    cells, wrong = stored(), 0
    for each in ROWS.values():
        if chosen and not any(word.lower() in f"{each.group} {each.title}".lower() for word in chosen):
            continue
        for name, method in METHODS.items():
            found = run(each, method)
            wrong += found.status == WRONG and not method.is_lora
            cells[each.title, name] = {
                "row": each.title,
                "method": name,
                "outcome": found.status,
                "note": found.note,
                "seconds": round(found.seconds, 2),
                "versions": versions,
            }
            print(f"{each.title:62} {name:6} {found.status:8} {found.seconds:5.1f} {found.note}", flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    order = [(title, method) for title in ROWS for method in METHODS if (title, method) in cells]
    RESULTS.write_text("".join(json.dumps(cells[key]) + "\n" for key in order), encoding="utf-8")
    missing = [title for title in ROWS if any((title, method) not in cells for method in METHODS)]
    if missing:
        print(f"{len(missing)} rows have no result yet, so no table: {', '.join(missing[:5])} ...")
    else:
        DOCUMENT.write_text(table(cells), encoding="utf-8")
    print({status: sum(each["outcome"] == status for each in cells.values()) for status in (WORKS, NOT_RUN, WRONG)})
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
