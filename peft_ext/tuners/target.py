"""Adapted modules, as coefficients see them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..checkpoint.identity import shape_name


class Sums(NamedTuple):
    """What the modules of an adapter have together.

    Attributes:
        weights: numbers in their weights.
        rows: rows of their weights, those of all experts counted.
        columns: likewise.
    """

    weights: int = 0
    rows: int = 0
    columns: int = 0


class Target(NamedTuple):
    """A module or a parameter that an adapter adapts, as its coefficients see it.

    Attributes:
        name: of the module or the parameter in the base model; empty for a whole network.
        fan_out: rows of its weight as a matrix; of one of them if there are several.
        fan_in: columns.
        biases: numbers in its bias.
        experts: how many matrices the weight is a stack of.
        sums: of all modules of the adapter, this one among them; see `together`.
        before: of those that come before it in the model.
    """

    name: str
    fan_out: int
    fan_in: int
    biases: int = 0
    experts: int = 1
    sums: Sums = Sums()
    before: Sums = Sums()

    @property
    def size(self) -> int:
        """Numbers in the weight."""
        return self.experts * self.fan_out * self.fan_in


def sums_of(targets: Iterable[Target]) -> Sums:
    """What some targets have together."""
    sizes = [(each.size, each.experts * each.fan_out, each.experts * each.fan_in) for each in targets]
    return Sums(*map(sum, zip(*sizes)))


def together(targets: Sequence[Target]) -> list[Target]:
    """The targets of one adapter, in the order of the model, each with what they have together."""
    sums, before = sums_of(targets), Sums()
    found = []
    for target in targets:
        found.append(target._replace(sums=sums, before=before))
        before = Sums(*map(sum, zip(before, sums_of([target]))))
    return found


def network_target(size: int) -> Target:
    """A whole network of so many parameters."""
    (whole,) = together([Target("", size, 1)])
    return whole


def shape_counts(targets: Sequence[Target]) -> dict[str, int]:
    """`{"out x in": number of modules}`; the shape of a stack of experts is `"out x in x experts"`."""
    return dict(Counter(shape_name(target.fan_out, target.fan_in, target.experts) for target in targets))
