"""Configuration of NOLA."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, Union

import torch
from peft.utils.other import get_pattern_key

from ...checks import check_default, check_number, check_positive_integer
from ...generators import Generator, RandomBasis, SignedCopies
from ..config import ELSEWHERE, SeededConfig, documented, weighted_sum
from ..limits import check_memory, check_multiple
from ..network import UPDATE, A, B, Filling, factor_parts, size_of
from ..start import beside_a_start
from ..target import Target

N = TypeVar("N", int, float)

_CANCELLED = 1e-3  # a sum this small beside its terms leaves too few digits of what it multiplies


@documented
@dataclass
class NolaConfig(SeededConfig):
    """
    Configuration of a [`NolaModel`]: LoRA whose factors are linear combinations of frozen random matrices.

    Paper: Koohpayegani et al., "NOLA: Compressing LoRA using Linear Combination of Random Basis",
    https://huggingface.co/papers/2310.02556. A layer trains `num_basis` coefficients for each factor whatever its
    size, and a checkpoint holds those and the seed.
    """

    r: int = field(
        default=8,
        metadata={
            "help": "Rank of the update. In a whole network that of a smaller matrix is its smaller side.",
            "generates": True,
        },
    )
    num_basis: Union[int, tuple[int, int]] = field(
        default=256,
        metadata={
            "help": (
                "Number of random matrices that are combined, that is of trained coefficients: one number for each of "
                "the factors A and B, or a pair (A, B)."
            ),
            "generates": True,
        },
    )
    alpha: float = field(
        default=8.0,
        metadata={
            "help": (
                "The update is scaled by alpha / r. In a whole network it is scaled by the rank alone, and alpha, "
                "rank_pattern and alpha_pattern must be left alone."
            ),
            "generates": True,
        },
    )
    nola_dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the input of the update."})
    share_basis: bool = field(
        default=True,
        metadata={
            "help": (
                "Layers of equal shape combine the same random matrices (default): they are kept in memory once, and "
                "all layers are computed in one product. False gives each layer its own, named after its module: they "
                "are drawn again at each use, which keeps memory small and makes a training step two to three times "
                "as long."
            ),
            "generates": True,
        },
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Ranks of single modules, by name or regular expression, in place of r.", "generates": True},
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata={
            "help": "Alphas of single modules, by name or regular expression, in place of alpha.",
            "generates": True,
        },
    )

    method_name = "NOLA"
    paper = "https://huggingface.co/papers/2310.02556"
    size_fields = ("num_basis",)
    factors_versions = (2,)

    def check_fields(self) -> None:
        super().check_fields()
        self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}
        check_positive_integer("r", self.r)
        check_number("alpha", self.alpha)
        for key, rank in self.rank_pattern.items():
            check_positive_integer(f"rank_pattern[{key!r}]", rank)
        for key, alpha in self.alpha_pattern.items():
            check_number(f"alpha_pattern[{key!r}]", alpha)
        if isinstance(self.num_basis, (list, tuple)):
            if len(self.num_basis) != 2:
                raise ValueError(
                    f"`num_basis` must be a positive integer or a pair of them (A, B), got {self.num_basis!r}."
                )
            self.num_basis = (self.num_basis[0], self.num_basis[1])  # JSON gives a list
        for number in self.num_basis_per_factor:
            check_positive_integer("num_basis", number)

    @property
    def num_basis_per_factor(self) -> tuple[int, int]:
        """Numbers of coefficients of A and of B in a layer."""
        return self.num_basis if isinstance(self.num_basis, tuple) else (self.num_basis, self.num_basis)

    def kinds(self, size: int) -> list[torch.Tensor]:
        num_A, num_B = self.num_basis_per_factor
        matrices, vectors = divmod(size, num_A + num_B)  # an adapted module is one matrix
        lengths = [matrices * num_A, matrices * num_B, *([vectors] if vectors else [])]
        return list(torch.arange(size).split(lengths))

    def scaled_factors(self, target: Target) -> list[float]:
        rows = target.experts * self.rank(target.name)
        return [self._factor(rows * target.fan_in, A), self._factor(rows * target.fan_out, B)]

    def _factor(self, size: int, kind: str) -> float:
        """The factor of the coefficients of `size` numbers: those of the factors `A` or `B`, or an `UPDATE`."""
        # The random matrices of a factor have a root mean square of 1 / sqrt(3) each.
        num_A, num_B = self.num_basis_per_factor
        return math.sqrt(3) * beside_a_start(size / num_A) if kind == A else math.sqrt(3 * size / num_B)

    def rank(self, module_name: str) -> int:
        """The rank of a module: that of its pattern, or `r`."""
        return _matching("rank_pattern", self.rank_pattern, module_name, self.r)

    def alpha_of(self, module_name: str) -> float:
        """The alpha of a module: that of its pattern, or `alpha`."""
        return _matching("alpha_pattern", self.alpha_pattern, module_name, self.alpha)

    def combined(self, vectors: Sequence[torch.Tensor], factors: Sequence[float]) -> torch.Tensor:
        """The coefficients that give the product of LoRA's `linear`: A is `sum_i p_i A_i` and B is `sum_i |p_i| B_i`.

        p_i is the square root of the factor's absolute value, with its sign. Every `A_i` has the offset A0, their sum
        has it P times, P being the sum of p_i, and the A of an adapter has it once: so A is divided by P, and B is
        multiplied by it.

        Raises:
            ValueError: the p_i cancel, and with them the offset.
        """
        if not any(factors):
            return torch.zeros_like(vectors[0])
        roots = [math.copysign(math.sqrt(abs(factor)), factor) for factor in factors]
        total = sum(roots)
        if abs(total) <= _CANCELLED * sum(map(abs, roots)):
            raise ValueError(
                "`weights` must not cancel for NOLA, whose A is a frozen offset beside the combined matrices: their "
                "square roots with signs, which LoRA's `linear` multiplies A by, must have a sum other than 0, got "
                f"{total:.3g} for weights times scales {[float(f'{factor:g}') for factor in factors]}. {ELSEWHERE}"
            )
        parts = [vector.split(self.num_basis_per_factor) for vector in vectors]
        a = weighted_sum([part[0] for part in parts], [root / total for root in roots])
        b = weighted_sum([part[1] for part in parts], [abs(root) * total for root in roots])
        return torch.cat([a, b])

    def check_sizes(self, targets: Sequence[Target]) -> None:
        num_A, num_B = self.num_basis_per_factor
        bases: set[tuple[str, int]] = set()
        factors = 0
        largest = max(r * max(t.fan_in, t.fan_out) for t in targets if (r := self.rank(t.name)))
        for target in targets:
            r = self.rank(target.name)
            self.alpha_of(target.name)  # refuses a pattern that contradicts itself
            field = "r" if r == self.r else "rank_pattern"
            check_multiple(field, r, max(target.fan_out, target.fan_in), f"columns or rows of {target.name!r}")
            bases |= {("A", num_A * r * target.fan_in), ("B", num_B * r * target.fan_out)}
            factors += target.experts * r * (target.fan_in + target.fan_out)
        check_multiple("num_basis", max(num_A, num_B), largest, "numbers in the largest factor")
        check_memory("`r` and `rank_pattern`", "the factors", factors, targets)
        check_memory("`num_basis`", "the coefficients", (num_A + num_B) * len(targets), targets)
        if self.share_basis:
            check_memory("`num_basis` and `r`", "the random matrices", sum(size for _, size in bases), targets)

    def generators(self, target: Target) -> tuple[Generator, Generator]:
        """What makes the factors A `(r, fan_in)` and B `(fan_out, r)` of a module.

        The entries of the random matrices are uniform on [-1, 1) / sqrt(num_basis), times the factor of A or B (see
        `factors`). A has an offset beside them, uniform on [-1, 1) / sqrt(fan_in), LoRA's usual initialisation.

        Experts have factors `(experts, r, fan_in)` and `(experts, fan_out, r)` from equally many coefficients: each
        reads them with signs of its own, and its A has an offset of its own; see `SignedCopies`.
        """
        r, experts, offset_scale = self.rank(target.name), target.experts, 1 / math.sqrt(target.fan_in)
        # Layers that share their basis draw it by shape; otherwise by the module's name as well, never by position.
        own: tuple[str, ...] = () if self.share_basis else (target.name,)
        num_A, num_B = self.num_basis_per_factor
        factor_A, factor_B = self.factors(target)
        offset = offset_scale if experts == 1 else 0.0
        basis_A = self._basis(("nola", "A", r, target.fan_in, *own), num_A, r * target.fan_in, factor_A, offset)
        basis_B = self._basis(("nola", "B", target.fan_out, r, *own), num_B, target.fan_out * r, factor_B)
        if experts > 1:
            return SignedCopies(basis_A, experts, offset_scale), SignedCopies(basis_B, experts)
        return basis_A, basis_B

    def _basis(
        self, stream: tuple[str | int, ...], number: int, size: int, factor: float, offset_scale: float = 0.0
    ) -> RandomBasis:
        """The basis of `number` coefficients for a factor of `size` numbers."""
        streamed, scale = not self.share_basis, factor / math.sqrt(number)
        return RandomBasis(self.seed, stream, number, size, scale, offset_scale, streamed, self.generator_version)

    def network_fillings(self, targets: Sequence[Target], keep_basis: bool = False) -> tuple[Filling, ...]:
        """The factors A of all matrices, then their factors B, each from coefficients of its own, then all vectors.

        The vectors, such as biases and the weights of norms, are one sequence that is combined from as many random
        vectors as a factor B is. The factors A start at random numbers of variance 1.
        """
        for name in ("alpha", "rank_pattern", "alpha_pattern"):
            check_default(
                self, name, "to make a whole network: `r` alone decides the ranks and the scale of its updates"
            )
        parts_A, parts_B, vectors = factor_parts(targets, self.r)
        num_A, num_B = self.num_basis_per_factor
        numbers, size = len(parts_A) * (num_A + num_B) + num_B * bool(vectors), sum(t.size for t in targets)
        if numbers > size:
            raise ValueError(
                f"`num_basis` must give at most as many coefficients as the network has parameters, {size}, got "
                f"{numbers} for the {len(parts_A)} matrices and the vectors."
            )
        found = []
        for part in (*parts_A, *parts_B):
            own = () if self.share_basis else (targets[part.place].name,)
            number, offset = (num_A, math.sqrt(3)) if part.kind == A else (num_B, 0.0)
            (factor,) = self.chosen([self._factor(part.size, part.kind)])
            stream = ("network", "nola", part.kind, *part.shape, *own)
            found.append(Filling(self._basis(stream, number, part.size, factor, offset), (part,), (factor,)))
        if vectors:
            (factor,) = self.chosen([self._factor(size_of(vectors), UPDATE)])
            generator = self._basis(("network", "nola", "vectors"), num_B, size_of(vectors), factor)
            found.append(Filling(generator, vectors, (factor,)))
        if self.share_basis:
            different = {filling.generator for filling in found}
            drawn = sum(sum(generator.frozen_sizes) for generator in different)
            check_memory("`num_basis` and `r`", "the random matrices", drawn, targets)
        return tuple(found)


def _matching(field: str, pattern: Mapping[str, N], module_name: str, default: N) -> N:
    """What a pattern gives a module.

    Raises:
        ValueError: keys of the pattern give it several: the first would count, and files do not keep their order.
    """
    keys = [key for key in pattern if get_pattern_key([key], module_name) == key]
    if len({pattern[key] for key in keys}) > 1:
        given = ", ".join(f"{pattern[key]} by {key!r}" for key in keys)
        raise ValueError(f"`{field}` must give one value to {module_name!r}, got {given}.")
    return pattern[keys[0]] if keys else default
