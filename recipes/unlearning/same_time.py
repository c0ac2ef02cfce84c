"""Baselines that get as much time as the method that they are compared with took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft_ext.unlearning.evaluation.results import GOLD, UnlearningResult
from peft_ext.unlearning.methods import Finetune, GaussNewton, Request, Retrain, Rewind, UnlearningMethod
from peft_ext.unlearning.methods.tuning import squeezed
from recipes.support.arguments import UserError, hint
from recipes.support.methods import folder_name

LABELS = {"finetune": "fine-tuning, same time", "retrain": "retraining, same time"}
"""What the rows of the baselines are called."""
NONE = "none"


@dataclass(frozen=True)
class SameTime:
    """Fine-tuning, or retraining, with as many optimizer steps as fit into the time that another method took.

    The number comes from the results of that method and of the gold in the same case with the same seed: its time
    (`UnlearningResult.time_over`) times the steps of the gold. So the schedule is planned to its end and a resumed
    recipe plans the same. A training that a clock ends would have neither; what this one took in the end is in the
    report.

    Attributes:
        kind: `"finetune"` goes on from the original; `"retrain"` goes from the initial parameters through the schedule
            of the training, warm-up too, as far as that went, in fewer steps. If there is time for all, it is the gold.
        like: label of the method that took the time.
    """

    kind: str
    like: str

    def plan(self, request: Request, folder: Path) -> tuple[Request, UnlearningMethod]:
        """Returns what is to be done: a request, and the method that serves it.

        Args:
            request: the original, what it is to forget, and how it was trained.
            folder: of this run; those of the other runs of the case are beside it.
        """
        seed = request.training.seed
        took, gold = (
            UnlearningResult.load(folder.with_name(f"{folder_name(label)}-seed{seed}")) for label in (self.like, GOLD)
        )
        fraction = took.time_over(gold)
        assert fraction is not None and gold.report is not None
        whole = int(gold.report["training"]["steps"])
        steps = max(1, round(whole * fraction))
        if self.kind == "finetune":
            return request, Finetune(max_steps=steps)
        if steps >= whole:
            return request, Retrain()
        training = squeezed(request.training, steps / whole)
        training.max_steps = round(steps / request.stopped_after)
        return replace(request, training=training), Retrain()


def parse_same_time(
    kinds: Sequence[str], like: str | None, methods: Mapping[str, UnlearningMethod]
) -> dict[str, SameTime]:
    """Reads `--same_time` and `--same_time_as`.

    Args:
        kinds: the baselines.
        like: label of the method whose time they get; if None, that of `default_like`.
        methods: all methods by their labels.

    Returns:
        The baselines by their labels. None if no method is named, and none is Rewind or Gauss-Newton.
    """
    known = [*LABELS, NONE]
    for kind in kinds:
        if kind not in known:
            raise UserError(f"same_time: unknown baseline {kind!r} (there are {', '.join(known)}){hint(kind, known)}")
    if len(set(kinds)) < len(kinds):
        raise UserError(f"same_time: {', '.join(kinds)}: one is there twice")
    if NONE in kinds:
        if len(kinds) > 1 or like is not None:
            raise UserError(f"same_time: {NONE!r} goes with no other baseline and not with --same_time_as")
        return {}
    if like is not None and like not in methods:
        raise UserError(f"same_time_as: no method is called {like!r} (there are {', '.join(methods)})")
    like = default_like(methods) if like is None else like
    return {} if like is None else {LABELS[kind]: SameTime(kind, like) for kind in kinds}


def default_like(methods: Mapping[str, UnlearningMethod]) -> str | None:
    """Returns the label of the first Rewind, or else of the first Gauss-Newton; None without both."""
    kinds = (Rewind, GaussNewton)
    return next((label for kind in kinds for label, method in methods.items() if isinstance(method, kind)), None)


def like_before(
    recorded: str | None, asked: str | None, before: Mapping[str, UnlearningMethod], now: Mapping[str, UnlearningMethod]
) -> str | None:
    """Returns the label of the method whose time the baselines of a run that is continued have.

    Args:
        recorded: what the run wrote down; the first versions did so only if it was named.
        asked: `--same_time_as` of the command that continues it.
        before: the methods of the run.
        now: those of the command.

    Returns:
        The label, of the present methods if there were no baselines yet; None if another one is asked for.

    Raises:
        UserError: the command does not name the method, and would have baselines of another one.
    """
    like = recorded or default_like(before)
    if like is None:
        return asked or default_like(now)
    if asked not in (None, like):
        return None
    if like not in now and default_like(now) is not None:
        raise UserError(
            f"same_time: the baselines of this run have the time of {like!r}, and results that are there are taken: "
            f"name {like!r} among the --methods too"
        )
    return like


def notes(baselines: Mapping[str, Any]) -> list[str]:
    """Returns sentences that say what the rows of baselines are."""
    return [
        f"{label}: as many optimizer steps as the gold takes in the time that {baseline.like} took in the same run."
        for label, baseline in baselines.items()
    ]
