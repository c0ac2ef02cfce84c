"""Configuration of PRANC."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...checks import check_choice, check_number, check_positive_integer, warn_of_no_effect
from ...generators import RandomBasis, SparseBasis
from ...generators.linear import LinearGenerator, index_type
from ..config import ELSEWHERE, SeededConfig, documented, weighted_sum
from ..limits import check_memory, check_rank
from ..network import A, B, Filling, whole_parts
from ..start import SMALL_START, beside_a_start
from ..target import Target, network_target, sums_of


@documented
@dataclass
class PrancConfig(SeededConfig):
    """
    Configuration of a [`PrancModel`]: one short vector of coefficients for the updates of all target weights together.

    Paper: Nooralinejad et al., "PRANC: Pseudo RAndom Networks for Compacting deep models",
    https://huggingface.co/papers/2206.08464. Every weight is updated by `basis @ coefficients / sqrt(fan_in)`, where
    the basis is random, frozen and regenerated from the seed. All layers read the same vector, so its length does not
    depend on the model. With `apply_to="factors"` the vector fills LoRA's factors A, beside a frozen random start, and
    B of all layers instead, as UniLoRA does (Li et al., https://huggingface.co/papers/2506.00799).
    """

    num_coefficients: int = field(
        default=10_000,
        metadata={
            "help": (
                "Length of the one vector that all layers read, that is the number of trained parameters. At most the "
                "number of target weights, or of the numbers in their factors."
            ),
            "generates": True,
        },
    )
    basis: str = field(
        default="sparse",
        metadata={
            "help": (
                "'sparse' (default): every weight reads nnz coefficients with random signs, each coefficient is read "
                "by equally many weights of a layer; two bytes a weight and number read are kept in memory, four above "
                "32,768 coefficients. 'dense', as published: every weight reads all of them with random factors of "
                "variance 1 / num_coefficients, drawn again at every use: steps take num_coefficients random numbers a "
                "weight, twice."
            ),
            "generates": True,
        },
    )
    nnz: int = field(
        default=1, metadata={"help": "Coefficients that a weight reads with the sparse basis.", "generates": True}
    )
    adapt_bias: bool = field(
        default=False,
        metadata={
            "help": (
                "Update the biases of the target layers too. (Name norms in target_modules to update their weights.)"
            ),
            "generates": True,
        },
    )
    apply_to: str = field(
        default="weight",
        metadata={
            "help": (
                "What the vector fills: 'weight' (default), the updates of whole weights, as published; 'factors', the "
                "LoRA factors A, beside a frozen random start, and B of updates of rank r, which cost what LoRA's "
                "do and learned more with as few coefficients (docs/choosing.md)."
            ),
            "generates": True,
        },
    )
    r: int = field(default=8, metadata={"help": "Rank of the update, for apply_to='factors'.", "generates": True})
    alpha: float = field(
        default=8.0,
        metadata={"help": "The update is scaled by alpha / r, for apply_to='factors'.", "generates": True},
    )
    pranc_dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the input of the update."})

    method_name = "PRANC"
    paper = "https://huggingface.co/papers/2206.08464"
    size_fields = ("num_coefficients",)

    def check_fields(self) -> None:
        super().check_fields()
        check_positive_integer("num_coefficients", self.num_coefficients)
        check_choice("basis", self.basis, ("sparse", "dense"))
        check_positive_integer("nnz", self.nnz)
        if self.nnz > self.num_coefficients:
            raise ValueError(
                f"`nnz` must be at most `num_coefficients` ({self.num_coefficients}), the coefficients that a weight "
                f"can read, got {self.nnz}."
            )
        check_choice("apply_to", self.apply_to, ("factors", "weight"))
        check_positive_integer("r", self.r)
        check_number("alpha", self.alpha)
        if self.on_factors and self.adapt_bias:
            raise ValueError("`adapt_bias` must be False with apply_to='factors', which biases have none of, got True.")
        if self.identity is None and not self.on_factors:
            for name in ("r", "alpha"):
                warn_of_no_effect(self, name, "with apply_to='weight', which has no rank; give apply_to='factors'")
        if self.identity is None and self.basis == "dense":
            warn_of_no_effect(self, "nnz", "with basis='dense': every weight reads all coefficients")
        if self.on_factors and self.basis != "sparse":
            raise ValueError(f"`basis` must be 'sparse' with apply_to='factors', got {self.basis!r}.")

    @property
    def on_factors(self) -> bool:
        """Whether the vector fills factors."""
        return self.apply_to == "factors"

    def generating(self) -> dict[str, Any]:
        found = super().generating()
        if not self.on_factors:  # adapters from before there was a choice know no such fields
            for name in ("apply_to", "r", "alpha"):
                del found[name]
        return found

    def described(self, target: Target) -> list[Any]:
        described = super().described(target)
        return [*described[:3], target.biases, *described[3:]] if self.adapt_bias else described

    def vector_sizes(self, targets: Sequence[Target]) -> list[int]:
        return [self.num_coefficients]

    def check_sizes(self, targets: Sequence[Target]) -> None:
        sums = sums_of(targets)
        size, what = sums.weights, "weights that they update"
        if self.on_factors:
            size, what = self.r * (sums.rows + sums.columns), "entries of the factors that they fill"
            check_rank(self.r, size, targets)
        if self.num_coefficients > size:
            raise ValueError(
                f"`num_coefficients` must be at most the number of {what}, {size} in the {len(targets)} target "
                f"modules, got {self.num_coefficients}."
            )
        if self.basis == "sparse":
            check_memory("`nnz`", "the tables of what weights read", self._read(size), targets)

    def _read(self, size: int) -> int:
        """What is kept of what so many weights read, in numbers of four bytes."""
        return -(-self.nnz * size * index_type(self.num_coefficients).itemsize // 4)

    def generators(self, target: Target) -> tuple[LinearGenerator, ...]:
        """What makes the update of a module's weights, and of its biases behind them with `adapt_bias`.

        On factors: what makes A `(r, fan_in)`, and what makes B `(fan_out, r)`, from the same coefficients. The A of
        all modules, in the order of the model, are one sequence, of which equally many numbers read each coefficient,
        and so are the B: with a basis for each module, less was learned. A has an offset, uniform on
        [-0.1, 0.1) / sqrt(fan_in), a tenth of LoRA's usual initialisation and about as small as UniLoRA's. Those of
        experts are all A, and all B.
        """
        factors, fan_out, fan_in = self.factors(target), target.fan_out, target.fan_in
        if not self.on_factors:
            size = target.size + (target.biases if self.adapt_bias else 0)
            stream = ("pranc", self.basis, target.name, fan_out, fan_in)
            return (self._generator(stream, size, factors[0], fan_in),)
        rows, start = target.experts * self.r, SMALL_START / math.sqrt(fan_in)
        before, sums = target.before, target.sums
        return (
            self._part(A, rows * fan_in, factors[0], start, before.columns, sums.columns),
            self._part(B, fan_out * rows, factors[1], 0.0, before.rows, sums.rows),
        )

    def _part(self, kind: str, size: int, factor: float, offset_scale: float, before: int, total: int) -> SparseBasis:
        """What makes `size` numbers of the sequence of all factors `A` or `B`, of rows or columns of length `r`."""
        stream, place = ("pranc", self.basis, kind), (self.r * before, self.r * total)
        return SparseBasis(
            self.seed,
            stream,
            self.num_coefficients,
            size,
            factor,
            self.nnz,
            offset_scale,
            *place,
            version=self.generator_version,
        )

    def scaled_factors(self, target: Target) -> list[float]:
        """That of the update, or those of A and of B."""
        sums = target.sums
        assert sums.weights, "a target alone does not say how many weights read the coefficients"
        if not self.on_factors:
            return [math.sqrt(sums.weights / self.num_coefficients)]
        shared_A, shared_B = (self.r * size / self.num_coefficients for size in (sums.columns, sums.rows))
        return [beside_a_start(shared_A), math.sqrt(shared_B)]

    def unscaled(self, coefficients: torch.Tensor, target: Target) -> torch.Tensor:
        return coefficients.div_(self.factors(target)[-1])  # on factors, that of B, which starts at zero

    def combined(self, vectors: Sequence[torch.Tensor], factors: Sequence[float]) -> torch.Tensor:
        """The sum of the vectors, each times its factor, whose update is that of the updates: they are linear.

        Raises:
            ValueError: the vectors fill factors, whose products are not linear in them.
        """
        if self.on_factors:
            raise ValueError(
                "Coefficients of PRANC on factors cannot be combined: the vector fills A and B at once, whose product "
                f"is not linear in it. {ELSEWHERE}"
            )
        return weighted_sum(vectors, factors)

    def network_fillings(self, targets: Sequence[Target], keep_basis: bool = False) -> tuple[Filling, ...]:
        if self.on_factors:
            raise ValueError(
                "`apply_to` must be 'weight' for PRANC to make a whole network, got 'factors': a NolaConfig, or a "
                "McncConfig with apply_to='factors', makes one from factors."
            )
        whole = network_target(sum(target.size for target in targets))
        if self.num_coefficients > whole.size:
            raise ValueError(
                f"`num_coefficients` must be at most the {whole.size} parameters of the network, got "
                f"{self.num_coefficients}."
            )
        if self.basis == "sparse":
            check_memory("`nnz`", "the tables of what weights read", self._read(whole.size), [whole])
        factors = self.factors(whole)
        generator = self._generator(("network", self.basis), whole.size, factors[0], streamed=not keep_basis)
        return (Filling(generator, whole_parts(targets), tuple(factors)),)

    def _generator(
        self,
        stream: tuple[str | int, ...],
        size: int,
        factor: float,
        fan_in: int = 1,
        streamed: bool = True,
    ) -> LinearGenerator:
        """What makes `size` weights, of root mean square `factor / sqrt(fan_in)` where that of the coefficients is 1.

        Args:
            streamed: draw a dense basis again at every use.
        """
        k, version = self.num_coefficients, self.generator_version
        if self.basis == "dense":
            scale = factor * math.sqrt(3 / (k * fan_in))
            return RandomBasis(self.seed, stream, k, size, scale, streamed=streamed, version=version)
        return SparseBasis(self.seed, stream, k, size, factor / math.sqrt(fan_in), self.nnz, version=version)
