"""Configuration of PRANC."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...checks import check_choice, check_positive_integer
from ...generators import RandomBasis, SparseBasis
from ...generators.linear import LinearGenerator
from ..config import SeededConfig, documented, weighted_sum
from ..limits import check_memory
from ..network import Filling, whole_parts
from ..target import Target, network_target


@documented
@dataclass
class PrancConfig(SeededConfig):
    """
    Configuration of a [`PrancModel`]: one short vector of coefficients for the updates of all target weights together.

    Paper: Nooralinejad et al., "PRANC: Pseudo RAndom Networks for Compacting deep models",
    https://huggingface.co/papers/2206.08464. Every weight is updated by `basis @ coefficients / sqrt(fan_in)`, where
    the basis is random, frozen and regenerated from the seed. All layers read the same vector, so its length does not
    depend on the model.
    """

    num_coefficients: int = field(
        default=10_000,
        metadata={
            "help": (
                "Length of the one vector that all layers read, that is the number of trained parameters. At most the "
                "number of target weights."
            ),
            "generates": True,
        },
    )
    basis: str = field(
        default="sparse",
        metadata={
            "help": (
                "'sparse' (default): every weight reads nnz coefficients with random signs, each coefficient is read "
                "by equally many weights of a layer; four bytes a weight and number read are kept in memory. 'dense', "
                "as published: every weight reads all of them with random factors of variance 1 / num_coefficients, "
                "drawn again at every use: steps take num_coefficients random numbers a weight, twice."
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

    def described(self, target: Target) -> list[Any]:
        described = super().described(target)
        return [*described[:3], target.biases, *described[3:]] if self.adapt_bias else described

    def vector_sizes(self, targets: Sequence[Target]) -> list[int]:
        return [self.num_coefficients]

    def check_sizes(self, targets: Sequence[Target]) -> None:
        weights = sum(target.size for target in targets)
        if self.num_coefficients > weights:
            raise ValueError(
                f"`num_coefficients` must be at most the number of weights that they update, {weights} in the "
                f"{len(targets)} target modules, got {self.num_coefficients}."
            )
        if self.basis == "sparse":
            check_memory("`nnz`", "the tables of what weights read", self.nnz * weights, targets)

    def generators(self, target: Target) -> tuple[LinearGenerator]:
        """What makes the update of a module's weights, and of its biases behind them with `adapt_bias`."""
        size = target.size + (target.biases if self.adapt_bias else 0)
        stream = ("pranc", self.basis, target.name, target.fan_out, target.fan_in)
        return (self._generator(stream, size, target),)

    def scaled_factors(self, target: Target) -> list[float]:
        assert target.adapted, "a target alone does not say how many weights read the coefficients"
        return [math.sqrt(target.adapted / self.num_coefficients)]

    def combined(self, vectors: Sequence[torch.Tensor], factors: Sequence[float]) -> torch.Tensor:
        """The sum of the vectors, each times its factor, whose update is that of the updates: they are linear."""
        return weighted_sum(vectors, factors)

    def network_fillings(self, targets: Sequence[Target], keep_basis: bool = False) -> tuple[Filling, ...]:
        whole = network_target(sum(target.size for target in targets))
        if self.num_coefficients > whole.size:
            raise ValueError(
                f"`num_coefficients` must be at most the {whole.size} parameters of the network, got "
                f"{self.num_coefficients}."
            )
        if self.basis == "sparse":
            check_memory("`nnz`", "the tables of what weights read", self.nnz * whole.size, [whole])
        generator = self._generator(("network", self.basis), whole.size, whole, keep_basis)
        return (Filling(generator, whole_parts(targets), tuple(self.factors(whole))),)

    def _generator(
        self, stream: tuple[str | int, ...], size: int, target: Target, keep_basis: bool = False
    ) -> LinearGenerator:
        """What makes `size` weights, with a variance of `1 / fan_in` where that of the scaled coefficients is 1."""
        k, version, fan_in = self.num_coefficients, self.generator_version, target.fan_in
        (factor,) = self.factors(target)
        if self.basis == "dense":
            scale = factor * math.sqrt(3 / (k * fan_in))
            return RandomBasis(self.seed, stream, k, size, scale=scale, streamed=not keep_basis, version=version)
        return SparseBasis(self.seed, stream, k, size, scale=factor / math.sqrt(fan_in), nnz=self.nnz, version=version)
