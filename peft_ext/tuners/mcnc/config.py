"""Configuration of MCNC."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import torch

from ... import randomness
from ...checkpoint.identity import parse_shape
from ...checks import check_choice, check_default, check_number, check_positive_integer, warn_of_no_effect
from ...generators import Generator, SineManifold
from ...generators.manifold import ACTIVATIONS
from ..config import SCALED, SeededConfig, documented
from ..limits import check_memory, check_rank
from ..network import UPDATE, A, B, Filling, Part, factor_parts, size_of, whole_parts
from ..start import SMALL_START, beside_a_start
from ..target import Target

# What a step moves the inputs of the first activation by, in learning rates; found by trying.
_PHASE = 50.0
_PHASE_OF_FACTORS = 150.0  # in adapters, since factors_version 3
_CHUNK = 5000
_CHUNK_OF_FACTORS = 500  # since factors_version 4
_MOST_LAYERS = 64  # hidden ones of the frozen network


@documented
@dataclass
class McncConfig(SeededConfig):
    """
    Configuration of a [`McncModel`]: updates cut into chunks, each a point on a curved surface from a random network.

    Paper: Thrash et al., "MCNC: Manifold-Constrained Reparameterization for Neural Compression",
    https://huggingface.co/papers/2406.19301. A chunk of `d` numbers is `beta * phi(alpha)`: phi is a frozen random
    network from `k` inputs to `d` outputs, regenerated from the seed and shared by all chunks; alpha and beta are
    trained. `d` numbers cost `k + 1` parameters. The update starts at zero (beta = 0) with alpha drawn from the seed.
    A patent application covers the method (US 20250384255 A1).
    """

    k: int = field(default=5, metadata={"help": "Inputs of the frozen network for a chunk.", "generates": True})
    d: Optional[int] = field(
        default=None,
        metadata={
            "help": (
                "Outputs of the frozen network, the numbers in a chunk; by default 500 in factors and 5000 in weights, "
                "in factors 5000 too with the 'plain' parametrization or a `factors_version` below 4. Each factor of "
                "a layer, or its weight, is cut into chunks, of which the last may be shorter. If given, at most the "
                "numbers of the largest one."
            ),
            "generates": True,
        },
    )
    widths: Sequence[int] = field(
        default=(32, 32),
        metadata={
            "help": (
                "Widths of the hidden layers of the frozen network, which costs memory, once for the whole adapter, "
                "and nothing in a checkpoint."
            ),
            "generates": True,
        },
    )
    activation: str = field(
        default="sine",
        metadata={"help": "Of the frozen network: 'sine', 'relu', 'tanh', or 'none' (linear).", "generates": True},
    )
    frequency: float = field(
        default=5.0,
        metadata={
            "help": (
                "Factor on the inputs of the first activation: how much the surface is curved. In a small experiment "
                "(benchmarks/seeded_digits.py) 5 and 10 did better than 1 with few coefficients."
            ),
            "generates": True,
        },
    )
    normalize: bool = field(
        default=True,
        metadata={
            "help": (
                "Scale the outputs of the frozen network to a root mean square of 1, so that the amplitude alone is "
                "the size of a chunk. The paper does not say whether it does."
            ),
            "generates": True,
        },
    )
    apply_to: str = field(
        default="factors",
        metadata={
            "help": (
                "What the chunks fill: 'factors' (default), the LoRA factors A, beside a frozen random start, and B of "
                "an update of rank r; 'weight', the update of the whole weight, scaled by 1 / sqrt(fan_in)."
            ),
            "generates": True,
        },
    )
    r: int = field(
        default=8,
        metadata={
            "help": (
                "Rank of the update, for apply_to='factors'. In a whole network that of a smaller matrix is its "
                "smaller side."
            ),
            "generates": True,
        },
    )
    alpha: float = field(
        default=8.0,
        metadata={
            "help": (
                "The update is scaled by alpha / r, for apply_to='factors'. In a whole network it is scaled by the "
                "rank alone, and alpha must be left alone."
            ),
            "generates": True,
        },
    )
    mcnc_dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the input of the update."})

    method_name = "MCNC"
    paper = "https://huggingface.co/papers/2406.19301"
    size_fields = ("k", "d", "r", "apply_to")
    factors_versions = (2, 3, 4)
    notice = "A patent application covers the method (US 20250384255 A1)."

    def check_fields(self) -> None:
        super().check_fields()
        for name, value in (("k", self.k), ("d", self.chunk_size), ("r", self.r)):
            check_positive_integer(name, value)
        if isinstance(self.widths, str) or not isinstance(self.widths, Sequence):
            raise ValueError(f"`widths` must be a list of positive integers, got {self.widths!r}.")
        self.widths = tuple(self.widths)
        if len(self.widths) > _MOST_LAYERS:
            raise ValueError(f"`widths` must have at most {_MOST_LAYERS} entries, got {len(self.widths)}.")
        for width in self.widths:
            check_positive_integer("widths", width)
        check_choice("activation", self.activation, tuple(ACTIVATIONS))
        check_choice("apply_to", self.apply_to, ("factors", "weight"))
        check_number("alpha", self.alpha)
        if self.identity is None and self.apply_to == "weight":
            for name in ("r", "alpha"):
                warn_of_no_effect(self, name, "with apply_to='weight', which has no rank; give apply_to='factors'")
        check_number("frequency", self.frequency)
        if self.frequency <= 0:
            raise ValueError(f"`frequency` must be positive, got {self.frequency!r}.")
        if self.k >= self.chunk_size:
            raise ValueError(
                f"`d` must be larger than `k` ({self.k}): a chunk of d numbers is made from k + 1, got "
                f"{self.chunk_size}."
            )

    def kinds(self, size: int) -> list[torch.Tensor]:
        places = torch.arange(size).view(-1, self.k + 1)
        return [places[:, : self.k].flatten(), places[:, self.k]]  # inputs and amplitudes

    def scaled_factors(self, target: Target) -> list[float]:
        """Those of the inputs and of the amplitudes of every sequence."""
        sizes = self.sizes(target.fan_out, target.fan_in, target.experts)
        kinds = (UPDATE,) if self.apply_to == "weight" else (A, B)
        phase = _PHASE_OF_FACTORS if self._factors_of_rule(3) else _PHASE
        return [factor for size, kind in zip(sizes, kinds) for factor in self._pair(size, kind, phase)]

    def _pair(self, size: int, kind: str, phase: float = _PHASE) -> list[float]:
        """The factors of the inputs and of the amplitudes of a sequence of `size` numbers.

        Args:
            kind: what the numbers are: those of the factors `A` or `B`, or an `UPDATE`.
            phase: what a step moves the inputs of the first activation by, in learning rates.
        """
        inputs, numbers = phase / self.frequency, min(self.chunk_size, size)
        if kind == UPDATE:
            return [inputs, math.sqrt(numbers)]  # an amplitude has so many numbers of its own
        # The inputs move the numbers as well: with them counted, few images were learned better.
        shared = numbers / (self.k + 1)
        return [inputs, beside_a_start(shared) if kind == A else math.sqrt(shared)]

    def _factors_of_rule(self, version: int) -> bool:
        """Whether the chunks fill factors by a rule of that version or a later one."""
        return self.apply_to == "factors" and self.rule is not None and self.rule >= version

    def unscaled(self, coefficients: torch.Tensor, target: Target) -> torch.Tensor:
        sizes = self.sizes(target.fan_out, target.fan_in, target.experts)
        lengths = [self._chunks(size) * (self.k + 1) for size in sizes]
        factors = self.factors(target)
        for part, inputs, amplitudes in zip(coefficients.split(lengths), factors[::2], factors[1::2]):
            self._divide(part, inputs, amplitudes)
        return coefficients

    def _divide(self, coefficients: torch.Tensor, inputs: float, amplitudes: float) -> None:
        coefficients.view(-1, self.k + 1)[:, : self.k] /= inputs
        coefficients.view(-1, self.k + 1)[:, self.k] /= amplitudes

    @property
    def chunk_size(self) -> int:
        """`d`, or its default."""
        if self.d is not None:
            return self.d
        return _CHUNK_OF_FACTORS if self._factors_of_rule(4) else _CHUNK

    def sizes(self, fan_out: int, fan_in: int, experts: int = 1) -> list[int]:
        """The numbers that chunks make for a module with a weight of that shape, in sequences that are cut apart."""
        if self.apply_to == "weight":
            return [experts * fan_out * fan_in]
        A, B = experts * self.r * fan_in, experts * fan_out * self.r
        return [A, B] if self.parametrization == SCALED else [A + B]

    def _chunks(self, size: int) -> int:
        return -(-size // self.chunk_size)

    def check_sizes(self, targets: Sequence[Target]) -> None:
        sizes = [size for target in targets for size in self.sizes(target.fan_out, target.fan_in, target.experts)]
        factors = self.apply_to == "factors"
        if factors:
            check_rank(self.r, sum(sizes), targets)
        if self.d is not None and self.d > max(sizes):
            what = "the largest factor" if factors else "the largest"
            raise ValueError(
                f"`d` must be at most the numbers that are cut into chunks, {max(sizes)} in {what} of the "
                f"{len(targets)} target modules with `apply_to={self.apply_to!r}`"
                + (f" and `r={self.r}`" if factors else "")
                + f", got {self.d}: a longer chunk would be cut off everywhere."
            )
        self._check_chunks(sum(map(self._chunks, sizes)), targets)

    def _check_chunks(self, chunks: int, targets: Sequence[Target]) -> None:
        check_memory("`widths`, `k` and `d`", "the frozen network", self._network_size, targets)
        check_memory("`k` and `d`", "the coefficients", chunks * (self.k + 1), targets)
        if self.widths:
            check_memory("`widths` and `d`", "the hidden layers", chunks * max(self.widths), targets)

    @property
    def _network_size(self) -> int:
        """Weights of the frozen network."""
        sizes = (self.k, *self.widths, self.chunk_size)
        return sum(fan_in * fan_out for fan_in, fan_out in zip(sizes, sizes[1:]))

    def generators(self, target: Target) -> tuple[SineManifold, ...]:
        """What fills the factors A `(r, fan_in)` and B `(fan_out, r)` of a module, or its update.

        Those of experts are filled one after the other: all A, then all B. Without scaling, one sequence of chunks
        fills both factors.
        """
        factors = self.factors(target)
        if self.apply_to == "weight":
            return (self._manifold(target.size, factors, scale=1 / math.sqrt(target.fan_in)),)
        first, *rest = self.sizes(target.fan_out, target.fan_in, target.experts)
        start: dict[str, Any] = {
            "offset_stream": ("mcnc", "A", self.r, target.fan_in, "offset"),
            "offset_size": target.experts * self.r * target.fan_in,
            "offset_scale": (SMALL_START if self._factors_of_rule(3) else 1.0) / math.sqrt(target.fan_in),
        }
        return self._manifold(first, factors, **start), *(self._manifold(size, factors[2:]) for size in rest)

    def network_fillings(self, targets: Sequence[Target], keep_basis: bool = False) -> tuple[Filling, ...]:
        """One sequence of chunks for all parameters, or for all factors A, for all factors B and for all vectors.

        The factors A start at random numbers of variance 1; those of a vector are its update.
        """
        sequences: tuple[tuple[Part, ...], ...] = (whole_parts(targets),)
        what = f"{sum(target.size for target in targets)} parameters of the network"
        if self.apply_to == "factors":
            check_default(self, "alpha", "to make a whole network: `r` alone decides the scale of its updates")
            sequences = factor_parts(targets, self.r)
            what = f"{max(map(size_of, sequences))} numbers of the factors A or B or of the vectors of the network"
        if self.chunk_size > max(map(size_of, sequences)):
            raise ValueError(f"`d` must be at most the {what}, got {self.chunk_size}.")
        self._check_chunks(sum(self._chunks(size_of(parts)) for parts in sequences), targets)
        return tuple(self._filling(parts) for parts in sequences if parts)

    def _filling(self, parts: tuple[Part, ...]) -> Filling:
        size, kind = size_of(parts), parts[0].kind
        start: dict[str, Any] = {
            "offset_stream": ("network", "mcnc", "A", "offset"),
            "offset_size": size,
            "offset_scale": math.sqrt(3),
        }
        factors = self.chosen(self._pair(size, kind))
        return Filling(self._manifold(size, factors, **(start if kind == A else {})), parts, tuple(factors))

    def _manifold(self, size: int, factors: Sequence[float], scale: float = 1.0, **options: Any) -> SineManifold:
        """The generator of a sequence of `size` numbers; phi is one and the same for all of them.

        Args:
            factors: of the inputs and of the amplitudes of the sequence; what follows is not read.
        """
        return SineManifold(
            self.seed,
            ("mcnc", "phi", self.k, *self.widths, self.chunk_size),
            size,
            self.k,
            self.chunk_size,
            tuple(self.widths),
            self.activation,
            self.frequency * factors[0],
            self.normalize,
            scale * factors[1],
            version=self.generator_version,
            **options,
        )

    def initial(self, target: Target, generators: tuple[Generator, ...]) -> torch.Tensor:
        """alpha from a stream of the seed, and amplitudes of zero, or within +- 0.1 without `init_weights`."""
        return self.unscaled(self._start(("mcnc", "alpha", target.name), generators), target)

    def network_initial(self, fillings: Sequence[Filling]) -> torch.Tensor:
        start = self._start(("network", "alpha"), [filling.generator for filling in fillings])
        sizes = [filling.generator.num_coefficients for filling in fillings]
        for part, filling in zip(start.split(sizes), fillings):
            self._divide(part, *filling.factors)
        return start

    def _start(self, stream: tuple[str | int, ...], generators: Sequence[Generator]) -> torch.Tensor:
        """Coefficients before they are divided by their factors."""
        size = sum(generator.num_coefficients for generator in generators)
        start = randomness.uniform(self.seed, stream, size, version=self.generator_version)
        start.view(-1, self.k + 1)[:, -1] *= 0.0 if self.init_weights else 0.1
        return start

    def card_rows(self, target_shapes: Mapping[str, int]) -> dict[str, str]:
        numbers = coefficients = 0
        for shape, layers in target_shapes.items():
            sizes = self.sizes(*parse_shape(shape))
            numbers += layers * sum(sizes)
            coefficients += layers * sum(map(self._chunks, sizes)) * (self.k + 1)
        ratio = numbers / max(coefficients, 1)
        return {
            "compression": f"{numbers:,} numbers from {coefficients:,} coefficients ({ratio:.0f} to 1), by a frozen "
            f"network of {self._network_size:,} weights that is not saved"
        }
