"""What the runs of an unlearning experiment leave on disk, and their order by case, method and seed."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...files import write_whole
from .metrics import Outcome

ORIGINAL, GOLD = "original", "retrain"
SPLITS = ("forget", "retain", "test")
_JSON, _ARRAYS = "unlearning.json", "unlearning.npz"


@dataclass
class UnlearningResult:
    """Holds what one model says of the data: before, retrained without the forget set, or after a method.

    It belongs to one seed and one case. All results of a case are about the same samples in the same order, whatever
    the seed.

    Attributes:
        case: what is forgotten, such as `"class 3"` or `"random 10 %"`.
        method: `"original"`, `"retrain"` (the gold), or a method's label.
        seed: the seed of the run. A method is compared with the gold of the same seed.
        outcomes: the model's outcome on `"forget"`, `"retain"` and `"test"`, and on `"heldout"` where test samples are
            not of the same kind as those to forget (a whole class): these are then the non-members of the attacks, in
            place of the test set.
        seconds: the wall time that the method took.
        processor_seconds: the time that its process was running; None if it worked on another device.
        peak_memory: the bytes of memory that it took at most.
        relearn_steps: training steps until the forget accuracy is back; None if it was not back within
            `relearn_limit`.
        relearn_limit: the steps that were tried; None if nothing was.
        parameters: how many numbers are trained.
        report: what the method says of its run, `UnlearningReport.to_dict()`; None for a model without a method's.
    """

    case: str
    method: str
    seed: int
    outcomes: dict[str, Outcome]
    seconds: float | None = None
    peak_memory: int | None = None
    relearn_steps: int | None = None
    relearn_limit: int | None = None
    parameters: int = 0
    report: dict[str, Any] | None = None
    processor_seconds: float | None = None

    def time_over(self, other: UnlearningResult) -> float | None:
        """Returns the time of this run relative to that of another; None if it is not known.

        It is a ratio of processor time where both are known, which other work on the machine changes little, and of
        wall time otherwise.
        """
        for own, others in ((self.processor_seconds, other.processor_seconds), (self.seconds, other.seconds)):
            if own is not None and others:
                return own / others
        return None

    @property
    def non_members(self) -> Outcome:
        """The outcome on samples that the model never saw and that the attacks compare the forget set with."""
        return self.outcomes.get("heldout", self.outcomes["test"])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `unlearning.json` and `unlearning.npz`, whole or not at all: what is there can be trusted."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays, rest = {}, {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "outcomes"}
        for split, outcome in self.outcomes.items():
            for f in dataclasses.fields(outcome):
                if (values := getattr(outcome, f.name)) is not None:
                    arrays[f"{split}.{f.name}"] = values
        packed = io.BytesIO()
        np.savez(packed, allow_pickle=False, **arrays)
        # The JSON file vouches for the arrays: the old one goes first and the new one comes last.
        (folder / _JSON).unlink(missing_ok=True)
        write_whole(folder / _ARRAYS, packed.getvalue())
        write_whole(folder / _JSON, json.dumps(rest, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> UnlearningResult:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: the folder holds no result, or only a part of one.
        """
        folder = Path(folder)
        rest = json.loads((folder / _JSON).read_text(encoding="utf-8"))
        found: dict[str, dict[str, Any]] = {}
        with np.load(folder / _ARRAYS, allow_pickle=False) as arrays:
            for key in arrays.files:
                split, _, name = key.rpartition(".")
                found.setdefault(split, {})[name] = arrays[key]
        return cls(outcomes={split: Outcome(**{"log_probs": None, **parts}) for split, parts in found.items()}, **rest)


def grouped(results: Sequence[UnlearningResult]) -> dict[str, dict[str, dict[int, UnlearningResult]]]:
    """Returns results by case, method and seed; the original and the gold come first, the rest as it appears.

    Raises:
        ValueError: two results have the same case, method and seed, results of a case are about other samples, or a
            set is missing.
    """
    groups: dict[str, dict[str, dict[int, UnlearningResult]]] = {}
    for result in results:
        missing = [split for split in SPLITS if split not in result.outcomes]
        if missing:
            raise ValueError(
                f"`outcomes` must be those of {', '.join(SPLITS)}; {', '.join(missing)} is missing in {_name(result)}."
            )
        runs = groups.setdefault(result.case, {ORIGINAL: {}, GOLD: {}}).setdefault(result.method, {})
        if result.seed in runs:
            raise ValueError(
                f"Every result must be there once, got two of {_name(result)}. Give each configuration of a method a "
                "label of its own."
            )
        runs[result.seed] = result
    for methods in groups.values():
        present = [run for runs in methods.values() for run in runs.values()]
        for run in present:
            sizes = [len(run.outcomes[split]) for split in SPLITS]
            expected = [len(present[0].outcomes[split]) for split in SPLITS]
            if sizes != expected:
                raise ValueError(
                    f"All results of a case must be about the same samples, got {expected} to forget, retain and test "
                    f"in {_name(present[0])}, {sizes} in {_name(run)}. Draw the forget set once for all seeds, or make "
                    "a case of each."
                )
    return {case: {name: runs for name, runs in methods.items() if runs} for case, methods in groups.items()}


def _name(result: UnlearningResult) -> str:
    return f"{result.method!r} in case {result.case!r} with seed {result.seed}"
