"""Whole networks, as coefficients see them: their parameters, and which of their numbers a generator makes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .. import randomness
from ..generators import Generator
from ..generators.base import autocast_off
from .target import Target

_VECTOR_SPREAD = 0.1  # of updates of norm weights and biases, which start at 1 and 0

UPDATE, A, B = "update", "A", "B"


class Weight(NamedTuple):
    """A parameter: starts uniform on `mean` +- `width`; updates of the size of the coefficients are times `spread`.

    Its update is one of `(fan_out, fan_in)` numbers, or `(size, 1)` for a vector, and is transposed if it is stored
    the other way round.
    """

    name: str
    shape: tuple[int, ...]
    mean: float
    width: float
    spread: float
    fan_out: int
    fan_in: int
    transposed: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def target(self) -> Target:
        return Target(self.name, self.fan_out, self.fan_in)


class Part(NamedTuple):
    """Numbers of one parameter: its whole update, or one of the two factors of it.

    Attributes:
        place: of the parameter among those of the network.
        kind: `UPDATE`, `A` or `B`.
        shape: rows and columns that the numbers are.
    """

    place: int
    kind: str
    shape: tuple[int, int]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Filling(NamedTuple):
    """What one generator makes of a network: the numbers of some parts, one part after the other.

    Attributes:
        generator: reads the coefficients behind those of the fillings before.
        parts: of `generator.size` numbers together.
        factors: what its coefficients of every kind are multiplied by.
    """

    generator: Generator
    parts: tuple[Part, ...]
    factors: tuple[float, ...]


def weights_of(network: nn.Module) -> Iterator[Weight]:
    """The parameters of a network in its order, one that is used in several places once.

    A linear or convolutional layer has a weight of outputs by all else, also where it is stored transposed (`Conv1D`).
    Other parameters of several dimensions, such as embeddings, have the last one as columns and all others as rows.
    """
    owners = {
        id(p): (module, name) for module in network.modules() for name, p in module.named_parameters(recurse=False)
    }
    for name, parameter in network.named_parameters():
        module, attribute = owners[id(parameter)]
        shape, size = tuple(parameter.shape), parameter.numel()
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd, Conv1D)) and attribute == "weight":
            transposed = isinstance(module, Conv1D)
            fan_in = shape[0] if transposed else parameter[0].numel()
            fans = _matrix(size // fan_in, fan_in)
            yield Weight(name, shape, 0.0, math.sqrt(3 / fan_in), 1 / math.sqrt(fan_in), *fans, transposed)
        elif len(shape) == 1:
            yield Weight(name, shape, 1.0 if attribute == "weight" else 0.0, 0.0, _VECTOR_SPREAD, size, 1)
        else:
            fans = _matrix(math.prod(shape[:-1]), shape[-1] if shape else 1)
            yield Weight(name, shape, 0.0, 0.02 * math.sqrt(3), 0.02, *fans)


def _matrix(fan_out: int, fan_in: int) -> tuple[int, int]:
    """Rows and columns; a matrix of one row or column is a vector, which has no use for factors."""
    return (fan_out, fan_in) if min(fan_out, fan_in) > 1 else (fan_out * fan_in, 1)


def start_of(seed: int, weights: tuple[Weight, ...], version: int) -> torch.Tensor:
    """The numbers that the parameters start at, one parameter after the other."""
    flat = torch.empty(sum(weight.size for weight in weights), dtype=torch.float32)
    for weight, part in zip(weights, flat.split([weight.size for weight in weights])):
        part.fill_(weight.mean)
        if weight.width:
            part.add_(randomness.uniform(seed, ("network", weight.name), weight.size, 0, version), alpha=weight.width)
    return flat


def is_matrix(target: Target) -> bool:
    """Whether the update of a parameter can be a product of factors: it has more than one row and one column."""
    return min(target.fan_out, target.fan_in) > 1


def whole_parts(targets: Sequence[Target]) -> tuple[Part, ...]:
    """All parameters, each as it is."""
    return tuple(Part(place, UPDATE, (each.fan_out, each.fan_in)) for place, each in enumerate(targets))


def factor_parts(targets: Sequence[Target], r: int) -> tuple[tuple[Part, ...], tuple[Part, ...], tuple[Part, ...]]:
    """The factors A and B of all matrices, and the vectors.

    Args:
        targets: the parameters.
        r: rank of the updates; at most the smaller side of a matrix is made, since a higher one adds nothing.

    Raises:
        ValueError: a rank that no parameter can have.
    """
    highest = max((min(each.fan_out, each.fan_in) for each in targets if is_matrix(each)), default=0)
    if r > highest:
        raise ValueError(
            f"`r` must be at most {highest}, the highest rank that the update of a parameter of the network can have, "
            f"got {r}."
        )
    ranks = {place: min(r, each.fan_out, each.fan_in) for place, each in enumerate(targets) if is_matrix(each)}
    return (
        tuple(Part(place, A, (rank, targets[place].fan_in)) for place, rank in ranks.items()),
        tuple(Part(place, B, (targets[place].fan_out, rank)) for place, rank in ranks.items()),
        tuple(part for part in whole_parts(targets) if part.place not in ranks),
    )


def size_of(parts: Sequence[Part]) -> int:
    """How many numbers the parts are."""
    return sum(part.size for part in parts)


def product(factor_B: torch.Tensor, factor_A: torch.Tensor, scaled: bool) -> torch.Tensor:
    """The update that has the factors B `(fan_out, r)` and A `(r, fan_in)`; of the size of B, since that of A is 1.

    With scaled factors it is `sqrt(fan_in / r)` times as large: `fan_out * r` numbers of B stand for `fan_out * fan_in`
    of the update (see `SeededConfig.factors`).
    """
    r, fan_in = factor_A.shape
    with autocast_off(factor_A.device):
        return (factor_B @ factor_A) * (math.sqrt(fan_in) / r if scaled else 1 / math.sqrt(r))


def matrices_of(targets: Sequence[Target], fillings: Sequence[Filling]) -> dict[str, list[int]]:
    """Rows and columns of the parameters whose updates are products of factors, by name."""
    parts = [part for filling in fillings for part in filling.parts if part.kind == A]
    return {targets[part.place].name: [targets[part.place].fan_out, targets[part.place].fan_in] for part in parts}


def saved_targets(shapes: Mapping[str, Sequence[int]], matrices: Mapping[str, Sequence[int]]) -> list[Target]:
    """The parameters of a saved network.

    Args:
        shapes: their sizes by name.
        matrices: rows and columns of those whose updates have factors.

    Raises:
        ValueError: rows and columns that do not fit the sizes.
    """
    targets = []
    for name, shape in shapes.items():
        size = math.prod(shape)
        fans = tuple(int(number) for number in matrices.get(name, (size, 1)))
        if len(fans) != 2 or min(fans) < 0 or math.prod(fans) != size:
            raise ValueError(f"`matrices` must be two numbers with a product of {size} for {name!r}, got {fans}.")
        targets.append(Target(name, *fans))
    return targets


def network_rows(fillings: Sequence[Filling]) -> dict[str, str]:
    """What model cards of networks whose updates have factors say of them."""
    numbers, coefficients = Counter[str](), Counter[str]()
    for filling in fillings:
        numbers[filling.parts[0].kind] += size_of(filling.parts)
        coefficients[filling.parts[0].kind] += filling.generator.num_coefficients
    ranks = [part.shape[0] for filling in fillings for part in filling.parts if part.kind == A]
    if not ranks:
        return {}
    made = {kind: f"{numbers[kind]:,} numbers from {coefficients[kind]:,} coefficients" for kind in numbers}
    rank = f"{min(ranks)}" if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"
    factors = f"{len(ranks)} matrices by factors of rank {rank} (A: {made[A]}; B: {made[B]})"
    return {"updates of": f"{factors}; vectors: {made[UPDATE]}" if UPDATE in made else factors}
