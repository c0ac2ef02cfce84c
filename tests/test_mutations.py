"""Changed checkpoints are refused, or give the very outputs of the untouched one; more in benchmarks/mutations.py."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import mutations

NUMBER = 15  # for each of 20 checkpoints
EXTREMES = 60


@pytest.fixture(autouse=True)
def quiet() -> None:
    mutations.quiet()


@pytest.mark.parametrize("dtype", mutations.DTYPES)
@pytest.mark.parametrize("method", mutations.METHODS)
def test_no_change_goes_unnoticed(method: str, dtype: str) -> None:
    subject = mutations.make(method, dtype)
    kinds = tuple(kind for kind in mutations.KINDS if kind != "extreme value")
    results = list(mutations.run(subject, random.Random(f"{method} {dtype}"), NUMBER, kinds))
    assert [result for result in results if result.outcome in mutations.BAD] == []
    assert any(result.outcome == "refused" for result in results)


@pytest.mark.parametrize("method", ["NOLA", "MCNC, weight", "VisualPrompt", "network, PRANC"])
def test_every_way_in_gives_the_same(method: str) -> None:
    """What the changed checkpoints are compared with; another adapter's name or configuration is refused."""
    subject = mutations.make(method, "int4")
    assert subject.expected.std() > 0
    for door in mutations.doors_of(subject):
        outcome, told = mutations.attempt(subject, subject.files, door)
        assert outcome == ("refused" if door == "load_adapter, other" else "same"), (door, told)


def test_a_silent_change_would_be_found() -> None:
    subject = mutations.make("NOLA", "float32")
    subject.expected = subject.expected + 1e-6
    assert mutations.attempt(subject, subject.files, "from_pretrained") == ("silent", "")


def test_an_error_of_ours_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = mutations.make("NOLA", "float32")
    monkeypatch.setattr("peft_ext.tuners.provenance.read_record", lambda *_: None)
    assert mutations.attempt(subject, subject.files, "from_pretrained")[0] == "crash"


EXTREME = """
import random
from benchmarks import mutations
mutations.quiet()
subjects = [mutations.make(name, "float32") for name in mutations.METHODS]
for subject in subjects:
    for result in mutations.run(subject, random.Random(subject.name), {number}, ("extreme value",)):
        if result.outcome in mutations.BAD:
            print(result)
"""


def test_extreme_values_cost_little() -> None:
    """In a process of its own, whose peak of memory shows what a single load adds to it."""
    code = EXTREME.format(number=EXTREMES // len(mutations.METHODS))
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == ""


def test_the_peak_of_memory_is_seen() -> None:
    code = """
import random, torch
from benchmarks import mutations
mutations.quiet()
subject = mutations.make("NOLA", "float32")
mutations.DOORS["from_pretrained"] = lambda *_: torch.ones(300_000_000)
print(mutations.attempt(subject, subject.files, "from_pretrained")[0])
"""
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout == "slow\n"
