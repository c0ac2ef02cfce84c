"""Which samples are to be forgotten: a class, a random share, memorised samples, groups of texts."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from recipes.support.arguments import UserError, hint
from recipes.support.methods import folder_name

SPLITS = ("forget01", "forget05", "forget10")
"""The splits of TOFU that can be forgotten: 2, 10 and 20 of 200 authors."""


@dataclass
class CaseArguments:
    """What is to be forgotten."""

    cases: list[str] = field(
        default_factory=lambda: ["random:0.1"],
        metadata={
            "help": "One or several, each compared by itself. 'class:NAME': all training images of a class; "
            "'random:SHARE': a share of the training samples, such as 0.1; 'memorised:SHARE': the share whose label "
            "depends most on their being trained on; 'filter': the texts whose source matches --forget_filter; "
            "'groups:SHARE': all texts of a share of the groups that --group_pattern tells apart. For --task tofu: "
            "'forget01', 'forget05' or 'forget10'."
        },
    )
    forget_seed: int = field(default=0, metadata={"help": "Seed of what is drawn for the cases; not that of a run."})
    forget_filter: str | None = field(
        default=None, metadata={"help": "Regular expression to be found in the source column, for the case 'filter'."}
    )
    group_pattern: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression whose first group names the group of a text, such as 'name\\[(.*?)\\]' for the "
            "restaurant; looked for in the source column, for the case 'groups'."
        },
    )
    memorised_pairs: int = field(
        default=2,
        metadata={
            "help": "For the case 'memorised' the model is trained twice as often, on a random half of the training "
            "samples and on the other half. Samples are ranked by the probability of their label, mean of the models "
            "that saw them minus mean of the others (Feldman & Zhang 2020)."
        },
    )


@dataclass(frozen=True)
class CaseSpec:
    """A case as the user named it.

    Attributes:
        kind: what comes before the colon.
        value: what comes after it: a class, or a share.
    """

    kind: str
    value: str | float | None

    @property
    def name(self) -> str:
        """The name of the case in tables."""
        if isinstance(self.value, float):
            return f"{self.kind} {100 * self.value:g} %"
        return self.kind if self.value is None else f"{self.kind} {self.value}"

    @property
    def folder(self) -> str:
        """The name as a folder name."""
        return folder_name(self.name)


@dataclass
class Samples:
    """Training or test samples in memory.

    Attributes:
        rows: the samples, as the collator takes them.
        kinds: what a case can choose by: the name of the class, the source of a text, or of a row of TOFU the splits
            that it is in, separated by spaces.
    """

    rows: Dataset
    kinds: list[str]

    def __len__(self) -> int:
        return len(self.kinds)


@dataclass
class Case:
    """What is forgotten, and what it is measured on.

    Attributes:
        name: what it is called in tables.
        folder: name of the folder that its runs are kept in.
        forget: places in the training samples.
        test: places in the test samples, those like the forget set left out.
        heldout: places of the test samples like the forget set (of the class, of the groups), if there are any.
    """

    name: str
    folder: str
    forget: list[int]
    test: list[int]
    heldout: list[int]


def parse_cases(args: CaseArguments, task: str) -> list[CaseSpec]:
    """Reads ``--cases``."""
    here = ["random", "memorised", *(["filter", "groups"] if task == "text" else ["class"])]
    if task == "tofu":
        here = list(SPLITS)
    specs = []
    for case in args.cases:
        kind, _, value = case.partition(":")
        if kind not in here:
            raise UserError(f"cases: unknown case {kind!r} (there are {', '.join(here)}){hint(kind, here)}")
        if kind in ("random", "memorised", "groups"):
            try:
                share = float(value)
            except ValueError:
                share = 0.0
            if not 0 < share < 1:
                raise UserError(f"cases: {case!r} needs a share between 0 and 1, such as {kind}:0.1")
            specs.append(CaseSpec(kind, share))
        elif kind == "class":
            if not value:
                raise UserError("cases: 'class' needs a name, such as class:3")
            specs.append(CaseSpec(kind, value))
        elif value:
            where = "; the expression is given with --forget_filter" if kind == "filter" else ""
            raise UserError(f"cases: nothing stands behind {kind!r}, got {case!r}{where}")
        else:
            specs.append(CaseSpec(kind, None))
    for flag, kind in (("forget_filter", "filter"), ("group_pattern", "groups")):
        pattern, asked = getattr(args, flag), any(spec.kind == kind for spec in specs)
        if asked != (pattern is not None):
            raise UserError(f"{flag}: the case {kind!r} and --{flag} belong together; give both or none")
        if pattern is not None:
            try:
                groups = re.compile(pattern).groups
            except re.error as error:
                raise UserError(f"{flag}: {pattern!r} is no regular expression: {error}") from error
            if kind == "groups" and groups == 0:
                raise UserError(f"{flag}: {pattern!r} has no group in parentheses, which names the group of a text")
    if not specs:
        raise UserError("cases: there is nothing to forget; name one, such as random:0.1")
    if len({spec.folder for spec in specs}) < len(specs):
        raise UserError(f"cases: {', '.join(args.cases)}: one is there twice")
    if args.memorised_pairs < 1:
        raise UserError(f"memorised_pairs is {args.memorised_pairs}; it must be at least 1")
    return specs


def choose(
    spec: CaseSpec, args: CaseArguments, train: Samples, test: Samples, memorisation: Callable[[], np.ndarray]
) -> Case:
    """Finds the samples of a case; copies of a sample are forgotten with it.

    Args:
        spec: the case.
        args: what else was asked for.
        train: training samples.
        test: test samples.
        memorisation: returns a score for every training sample.
    """
    belongs: Callable[[str], bool] | None = None
    rng = np.random.default_rng(args.forget_seed)
    if spec.kind == "class":
        names = list(dict.fromkeys(train.kinds))
        if spec.value not in names:
            raise UserError(f"cases: there is no class {spec.value!r}; there are {', '.join(names[:20])}")
        belongs = lambda kind: kind == spec.value  # noqa: E731
    elif spec.kind == "filter":
        expression = re.compile(str(args.forget_filter))
        belongs = lambda kind: expression.search(kind) is not None  # noqa: E731
    elif spec.kind in SPLITS:
        belongs = lambda kind: spec.kind in kind.split()  # noqa: E731
    elif spec.kind == "groups":
        find = re.compile(str(args.group_pattern))

        def group(kind: str) -> str | None:
            found = find.search(kind)
            return found.group(1) if found else None

        groups = sorted({name for kind in train.kinds if (name := group(kind)) is not None})
        if len(groups) < 2:
            raise UserError(f"group_pattern: {args.group_pattern!r} finds {len(groups)} groups; there must be two")
        chosen = set(rng.permutation(groups)[: _count(spec.value, len(groups))].tolist())
        belongs = lambda kind: group(kind) in chosen  # noqa: E731

    if belongs is not None:
        forget = [place for place, kind in enumerate(train.kinds) if belongs(kind)]
        heldout = [place for place, kind in enumerate(test.kinds) if belongs(kind)]
    else:
        count, heldout = _count(spec.value, len(train)), []
        order = rng.permutation(len(train)) if spec.kind == "random" else np.argsort(-memorisation(), kind="stable")
        forget = sorted(order[:count].tolist())
    if forget:
        forget = with_copies(train.rows, len(train), forget)
    for size, what in ((len(forget), "none"), (len(train) - len(forget), "all")):
        if size == 0:
            pattern = f" (--forget_filter {args.forget_filter!r})" if spec.kind == "filter" else ""
            raise UserError(
                f"cases: {spec.name}{pattern} takes {what} of the {len(train)} training samples; something must be "
                "forgotten, and something must stay"
            )
    rest = sorted(set(range(len(test))) - set(heldout))
    # Where all test samples are like those to forget there are no others to test on.
    return Case(spec.name, spec.folder, forget, rest or heldout, heldout if rest else [])


def _count(share: Any, total: int) -> int:
    return max(1, round(share * total))


def with_copies(rows: Any, total: int, chosen: Sequence[int]) -> list[int]:
    """Returns the chosen rows and all that are equal to one of them: who keeps a copy has not forgotten a sample.

    Args:
        rows: all samples.
        total: their number.
        chosen: places of some.
    """
    keys = [_content(rows[place]) for place in range(total)]
    forgotten = {keys[place] for place in chosen}
    return [place for place, key in enumerate(keys) if key in forgotten]


def _content(row: dict[str, Any]) -> Hashable:
    return tuple(
        value.numpy().tobytes() if torch.is_tensor(value) else tuple(value) if isinstance(value, list) else value
        for _, value in sorted(row.items())
    )


def memorisation_scores(
    total: int, pairs: int, seed: int, probabilities: Callable[[list[int], int], np.ndarray]
) -> np.ndarray:
    """Returns how much the probability of a label owes to its being trained on (Feldman & Zhang 2020, equation 2).

    Args:
        total: number of training samples.
        pairs: how many pairs of trainings are done, on a random half and on the other half, so that every sample is in
            half of all.
        seed: decides the halves and the trainings.
        probabilities: trains on the samples at some places with a seed, and returns the probability of the label of
            every sample.

    Returns:
        The mean probability in the trainings with a sample minus that in those without it, shape `(total,)`.
    """
    rng = np.random.default_rng(seed)
    scores = np.zeros(total)
    for pair in range(pairs):
        order = rng.permutation(total)
        for number, half in enumerate((order[: total // 2], order[total // 2 :])):
            found = probabilities(sorted(half.tolist()), 1_000_000 + 2 * pair + number)
            sign = np.full(total, -1.0)
            sign[half] = 1.0
            scores += sign * found / pairs
    return scores
