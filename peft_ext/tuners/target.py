"""Adapted modules, as coefficients see them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from ..checkpoint.identity import shape_name


class Target(NamedTuple):
    """A module or a parameter that an adapter adapts, as its coefficients see it.

    Attributes:
        name: of the module or the parameter in the base model; empty for a whole network.
        fan_out: rows of its weight as a matrix; of one of them if there are several.
        fan_in: columns.
        biases: numbers in its bias.
        experts: how many matrices the weight is a stack of.
        adapted: numbers in the weights of all modules of the adapter, this one's among them; see `together`.
    """

    name: str
    fan_out: int
    fan_in: int
    biases: int = 0
    experts: int = 1
    adapted: int = 0

    @property
    def size(self) -> int:
        """Numbers in the weight."""
        return self.experts * self.fan_out * self.fan_in


def together(targets: Sequence[Target]) -> list[Target]:
    """The targets of one adapter, each with the numbers that they have together."""
    adapted = sum(target.size for target in targets)
    return [target._replace(adapted=adapted) for target in targets]


def network_target(size: int) -> Target:
    """A whole network of so many parameters."""
    return Target("", size, 1, adapted=size)


def shape_counts(targets: Sequence[Target]) -> dict[str, int]:
    """`{"out x in": number of modules}`; the shape of a stack of experts is `"out x in x experts"`."""
    return dict(Counter(shape_name(target.fan_out, target.fan_in, target.experts) for target in targets))
