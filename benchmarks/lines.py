"""Results as JSON lines, each with what it takes to measure it again: versions, machine and command."""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import peft_ext

RESULTS = Path(__file__).parent / "results"


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a file, none where there is no file.

    Raises:
        ValueError: a line is no JSON, such as the last one of a process that was killed while it wrote.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} is no JSON ({error}); delete the line") from error
    return rows


def find(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the last line of a file that has all the entries of `identity`, if there is one."""
    for row in reversed(read(path)):
        if all(name in row and row[name] == value for name, value in identity.items()):
            return row
    return None


def apart(rows: Iterable[dict[str, Any]], *names: str) -> dict[str, list[dict[str, Any]]]:
    """Returns the lines that have the same settings, by a text of what tells these from the others; most lines first.

    Args:
        rows: the lines.
        names: their entries that are settings, or mappings of settings. A line without one is of another setting.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    settings: dict[str, dict[str, str]] = {}
    for row in rows:
        given = {name: row[name] for name in names if name in row}
        key = json.dumps(given, sort_keys=True)
        groups.setdefault(key, []).append(row)
        parts = [value if isinstance(value, dict) else {name: value} for name, value in given.items()]
        settings[key] = {name: str(value) for part in parts for name, value in part.items()}
    known = dict.fromkeys(name for setting in settings.values() for name in setting)
    different = [name for name in known if len({setting.get(name) for setting in settings.values()}) > 1]
    found = {}
    for key, group in sorted(groups.items(), key=lambda pair: -len(pair[1])):
        text = ", ".join(f"{name} {settings[key][name]}" for name in different if name in settings[key])
        found[text] = group
    return found


def append(path: Path, row: dict[str, Any]) -> None:
    """Adds a line in one write, so that several programs can add to one file. NaN and infinity are refused."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def provenance(command: Iterable[str]) -> dict[str, Any]:
    """Returns the machine, the versions, and a command without the folders that only this machine has."""
    return {
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": {each.__name__: each.__version__ for each in (torch, transformers, peft, peft_ext)},
        "command": shlex.join(_without_folders(word) for word in command),
    }


def command(name: str, argv: Iterable[str]) -> list[str]:
    """Returns what starts a benchmark with some arguments."""
    return ["python", "-m", "benchmarks", "run", name, *argv]


def _without_folders(word: str) -> str:
    flag, equals, value = word.rpartition("=")
    folder = Path(value).is_absolute() or (os.sep in value and Path(value).exists())
    return f"{flag}{equals}{Path(value).name}" if folder else word
