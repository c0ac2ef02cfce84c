"""What an unlearning experiment leaves on disk."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .metrics import Outcome

ORIGINAL, GOLD = "original", "retrain"
SPLITS = ("forget", "retain", "test")
_JSON, _ARRAYS = "unlearning.json", "unlearning.npz"


@dataclass
class UnlearningResult:
    """One model: before, retrained without the forget set, or after a method; with one seed, in one case.

    All results of a case are about the same samples, in the same order, whatever the seed.

    Attributes:
        case: What is forgotten: `"class 3"`, `"random 10 %"`.
        method: `"original"`, `"retrain"` (the gold), or a method's label.
        seed: The run's seed. A method is compared with the gold of the same seed.
        outcomes: Of `"forget"`, `"retain"` and `"test"`, and of `"heldout"` where test samples are not of the same kind
            as those to forget (a whole class): the non-members of the attacks, in place of the test set.
        seconds: Time that the method took.
        peak_memory: Bytes that it took.
        relearn_steps: Training steps until the forget accuracy is back; None if it was not within `relearn_limit`.
        relearn_limit: Steps that were tried; None if nothing was.
        parameters: Numbers that are trained.
        notes: What the method says of itself: curvature estimator and its error, steps that it backed off from.
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
    notes: list[str] = field(default_factory=list)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `unlearning.json` and `unlearning.npz`, whole or not at all: what is there can be trusted."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays, rest = {}, {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "outcomes"}
        for split, outcome in self.outcomes.items():
            for f in dataclasses.fields(outcome):
                if (values := getattr(outcome, f.name)) is not None:
                    arrays[f"{split}.{f.name}"] = values
        # The JSON file vouches for the arrays: it goes first and comes last.
        (folder / _JSON).unlink(missing_ok=True)
        partial = folder / f"{_ARRAYS}.partial"
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        partial.replace(folder / _ARRAYS)
        partial = folder / f"{_JSON}.partial"
        partial.write_text(json.dumps(rest, indent=1) + "\n", encoding="utf-8")
        partial.replace(folder / _JSON)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> UnlearningResult:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: nothing there, or not the whole.
        """
        folder = Path(folder)
        rest = json.loads((folder / _JSON).read_text(encoding="utf-8"))
        found: dict[str, dict[str, Any]] = {}
        with np.load(folder / _ARRAYS, allow_pickle=False) as arrays:
            for key in arrays.files:
                split, _, name = key.rpartition(".")
                found.setdefault(split, {})[name] = arrays[key]
        return cls(outcomes={split: Outcome(**{"log_probs": None, **parts}) for split, parts in found.items()}, **rest)
