"""Configuration of MCNC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from peft.utils import PeftType

from ... import randomness
from ...checkpoint.identity import parse_shape
from ...checks import check_choice, check_number, check_positive_integer, check_probability
from ...generators import SineManifold
from ...generators.manifold import ACTIVATIONS
from ..config import SeededConfig


@dataclass
class McncConfig(SeededConfig):
    """
    Configuration of a [`McncModel`]: updates cut into chunks, each a point on a curved surface from a random network.

    Paper: Thrash et al., "MCNC: Manifold-Constrained Reparameterization for Neural Compression",
    https://huggingface.co/papers/2406.19301. A chunk of `d` numbers is `beta * phi(alpha)`: phi is a frozen random
    network from `k` inputs to `d` outputs, regenerated from the seed and shared by all chunks; alpha and beta are
    trained. `d` numbers cost `k + 1` parameters. The update starts at zero (beta = 0) with alpha drawn from the seed.
    A patent application covers the method (US 20250384255 A1).

    Args:
        k (`int`):
            Inputs of phi for a chunk.
        d (`int`, *optional*):
            Outputs of phi, the numbers in a chunk; 5000 by default. Chunks are cut layer by layer, the last one of a
            layer may be shorter. If given, at most what the largest layer needs.
        widths (`Sequence[int]`):
            Widths of phi's hidden layers. phi costs memory, once for the whole adapter, and nothing in a checkpoint.
        activation (`str`):
            `"sine"`, `"relu"`, `"tanh"`, or `"none"`, which makes phi linear.
        frequency (`float`):
            Factor on the inputs of the first activation: how much the surface is curved. In a small experiment
            (`benchmarks/seeded_digits.py`) 5 and 10 did better than 1 with few coefficients.
        normalize (`bool`):
            Scale the outputs of phi to a root mean square of 1, so that beta alone is the size of a chunk. The paper
            does not say whether it does.
        apply_to (`str`):
            `"factors"` (default): the chunks fill the LoRA factors A, beside a frozen random start, and B. `"weight"`:
            they fill the update of the whole weight, scaled by `1 / sqrt(fan_in)`.
        r (`int`):
            Rank of the update, for `apply_to="factors"`.
        alpha (`float`):
            The update is scaled by `alpha / r`, for `apply_to="factors"`.
        mcnc_dropout (`float`):
            Dropout probability on the input of the update.
        seed (`int`):
            0 to 2**64 - 1. phi, the start of A and the first alpha are drawn from it, alike on every machine.
        target_modules (`Union[list[str], str]`, *optional*):
            Names of the modules to adapt, a regular expression, or `"all-linear"`. By default the query and value
            projections of known architectures. `nn.Linear`, `Conv1D`, `nn.Conv2d`, `nn.Embedding` and the quantized
            linear layers that PEFT knows can be adapted.
        exclude_modules (`Union[list[str], str]`, *optional*):
            Names of modules, or a regular expression, to leave out.
        fan_in_fan_out (`bool`):
            The weight of a layer of unknown type is stored as (in, out). Known types are recognised.
        bias (`str`):
            Which biases are trained and saved: `"none"`, `"all"` or `"mcnc_only"`.
        modules_to_save (`list[str]`, *optional*):
            Modules that are trained and saved whole beside the adapter, such as a new classifier.
        init_weights (`bool`):
            Start with an update of zero (default), or with random amplitudes (`False`; for tests).
        layers_to_transform (`Union[list[int], int]`, *optional*):
            Adapt only the layers of these indexes.
        layers_pattern (`Union[list[str], str]`, *optional*):
            Name of the `nn.ModuleList` that `layers_to_transform` indexes, such as `"layers"` or `"h"`.
        generator_version (`int`):
            Version of the random number specification. Leave it alone.
        fingerprint (`str`, *optional*):
            Written to checkpoints and checked when they are loaded. Leave it alone.
        target_shapes (`dict[str, int]`, *optional*):
            Written to checkpoints and checked when they are loaded. Leave it alone.

    Raises:
        ValueError: a field holds what it cannot; the message names the field, what was given and what is allowed.
    """

    k: int = field(default=5, metadata={"help": "Inputs of the frozen network for a chunk."})
    d: Optional[int] = field(
        default=None, metadata={"help": "Outputs of the frozen network, the numbers in a chunk; 5000 by default."}
    )
    widths: Sequence[int] = field(
        default=(32, 32), metadata={"help": "Widths of the hidden layers of the frozen network."}
    )
    activation: str = field(
        default="sine", metadata={"help": "Of the frozen network: 'sine', 'relu', 'tanh', or 'none' (linear)."}
    )
    frequency: float = field(
        default=5.0, metadata={"help": "Factor on the inputs of the first activation: how much the surface is curved."}
    )
    normalize: bool = field(
        default=True, metadata={"help": "Scale the outputs of the frozen network to a root mean square of 1."}
    )
    apply_to: str = field(
        default="factors",
        metadata={"help": "What the chunks fill: 'factors', those of a LoRA update of rank r, or 'weight'."},
    )
    r: int = field(default=8, metadata={"help": "Rank of the update, for apply_to='factors'."})
    alpha: float = field(default=8.0, metadata={"help": "The update is scaled by alpha / r, for apply_to='factors'."})
    mcnc_dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the input of the update."})

    method_name = "MCNC"
    paper = "https://huggingface.co/papers/2406.19301"
    size_fields = ("k", "d", "r", "apply_to")
    notice = "A patent application covers the method (US 20250384255 A1)."

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.MCNC  # type: ignore[attr-defined]
        self.check_bias("mcnc_only")
        check_probability("mcnc_dropout", self.mcnc_dropout)
        for name, value in (("k", self.k), ("d", self.chunk_size), ("r", self.r)):
            check_positive_integer(name, value)
        if isinstance(self.widths, str) or not isinstance(self.widths, Sequence):
            raise ValueError(f"`widths` must be a list of positive integers, got {self.widths!r}.")
        self.widths = tuple(self.widths)
        for width in self.widths:
            check_positive_integer("widths", width)
        check_choice("activation", self.activation, tuple(ACTIVATIONS))
        check_choice("apply_to", self.apply_to, ("factors", "weight"))
        check_number("alpha", self.alpha)
        check_number("frequency", self.frequency)
        if self.frequency <= 0:
            raise ValueError(f"`frequency` must be positive, got {self.frequency!r}.")
        if self.k >= self.chunk_size:
            raise ValueError(
                f"`d` must be larger than `k` ({self.k}): a chunk of d numbers is made from k + 1, got "
                f"{self.chunk_size}."
            )

    @property
    def chunk_size(self) -> int:
        """`d`, or its default."""
        return 5000 if self.d is None else self.d

    def layer_size(self, fan_out: int, fan_in: int) -> int:
        """The numbers that chunks make for a layer with a weight of that shape."""
        return self.r * (fan_out + fan_in) if self.apply_to == "factors" else fan_out * fan_in

    def manifold(self, size: int, **options: Any) -> SineManifold:
        """The generator of `size` numbers; phi is one and the same for all sizes."""
        return SineManifold(
            self.seed,
            ("mcnc", "phi", self.k, *self.widths, self.chunk_size),
            size,
            self.k,
            self.chunk_size,
            tuple(self.widths),
            self.activation,
            self.frequency,
            self.normalize,
            version=self.generator_version,
            **options,
        )

    def start(self, manifold: SineManifold, stream: tuple[str, ...], amplitude: float = 0.0) -> torch.Tensor:
        """The coefficients that training starts from, from a stream of the seed; beta is within +- `amplitude`."""
        start = randomness.uniform(self.seed, stream, manifold.num_coefficients, version=self.generator_version)
        start.view(-1, self.k + 1)[:, -1] *= amplitude  # beta
        return start

    def card_rows(self, target_shapes: Mapping[str, int]) -> dict[str, str]:
        numbers = coefficients = 0
        for shape, layers in target_shapes.items():
            size = self.layer_size(*parse_shape(shape))
            numbers += layers * size
            coefficients += layers * -(-size // self.chunk_size) * (self.k + 1)
        sizes = (self.k, *self.widths, self.chunk_size)
        network = sum(fan_in * fan_out for fan_in, fan_out in zip(sizes, sizes[1:]))
        return {
            "compression": f"{numbers:,} numbers from {coefficients:,} coefficients "
            f"({numbers / max(coefficients, 1):.0f} to 1), by a frozen network of {network:,} weights that is not saved"
        }
