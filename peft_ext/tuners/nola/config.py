"""Configuration of NOLA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Union

from peft.utils import PeftType

from ...checks import check_number, check_positive_integer, check_probability
from ..config import SeededConfig


@dataclass
class NolaConfig(SeededConfig):
    """
    Configuration of a [`NolaModel`]: LoRA whose factors are linear combinations of frozen random matrices.

    Paper: Koohpayegani et al., "NOLA: Compressing LoRA using Linear Combination of Random Basis",
    https://huggingface.co/papers/2310.02556. A layer trains `num_basis` coefficients for each factor whatever its
    size, and a checkpoint holds those and the seed.

    Args:
        r (`int`):
            Rank of the update.
        num_basis (`int` or pair of `int`):
            Number of random matrices that are combined, that is of trained coefficients: one number for each of the
            factors A and B, or a pair (A, B).
        alpha (`float`):
            The update is scaled by `alpha / r`.
        nola_dropout (`float`):
            Dropout probability on the input of the update.
        seed (`int`):
            0 to 2**64 - 1. The random matrices are drawn from it, alike on every machine.
        share_basis (`bool`):
            Layers of equal shape combine the same random matrices (default): they are kept in memory once, and all
            layers are computed in one product. `False` gives each layer its own, named after its module: they are
            drawn again at each use, which keeps memory small and makes a training step two to three times as long.
        target_modules (`Union[list[str], str]`, *optional*):
            Names of the modules to adapt, a regular expression, or `"all-linear"`. By default the query and value
            projections of known architectures. `nn.Linear`, `Conv1D`, `nn.Conv2d`, `nn.Embedding` and the quantized
            linear layers that PEFT knows can be adapted.
        exclude_modules (`Union[list[str], str]`, *optional*):
            Names of modules, or a regular expression, to leave out.
        fan_in_fan_out (`bool`):
            The weight of a layer of unknown type is stored as (in, out). Known types are recognised.
        bias (`str`):
            Which biases are trained and saved: `"none"`, `"all"` or `"nola_only"`.
        modules_to_save (`list[str]`, *optional*):
            Modules that are trained and saved whole beside the adapter, such as a new classifier.
        init_weights (`bool`):
            Start with an update of zero (default), or with random coefficients (`False`; for tests).
        layers_to_transform (`Union[list[int], int]`, *optional*):
            Adapt only the layers of these indexes.
        layers_pattern (`Union[list[str], str]`, *optional*):
            Name of the `nn.ModuleList` that `layers_to_transform` indexes, such as `"layers"` or `"h"`.
        rank_pattern (`dict[str, int]`):
            Ranks of single modules, by name or regular expression, in place of `r`.
        alpha_pattern (`dict[str, float]`):
            The same for `alpha`.
        generator_version (`int`):
            Version of the random number specification. Leave it alone.
        fingerprint (`str`, *optional*):
            Written to checkpoints and checked when they are loaded. Leave it alone.
        target_shapes (`dict[str, int]`, *optional*):
            Written to checkpoints and checked when they are loaded. Leave it alone.

    Raises:
        ValueError: a field holds what it cannot; the message names the field, what was given and what is allowed.
    """

    r: int = field(default=8, metadata={"help": "Rank of the update."})
    num_basis: Union[int, tuple[int, int]] = field(
        default=256,
        metadata={
            "help": (
                "Number of random matrices that are combined, that is of trained coefficients: one number for each of "
                "the factors A and B, or a pair (A, B)."
            )
        },
    )
    alpha: float = field(default=8.0, metadata={"help": "The update is scaled by alpha / r."})
    nola_dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the input of the update."})
    share_basis: bool = field(
        default=True,
        metadata={
            "help": (
                "Layers of equal shape combine the same random matrices. False gives each layer its own, drawn again "
                "at each use: little memory, steps two to three times as long."
            )
        },
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Ranks of single modules, by name or regular expression, in place of r."},
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "Alphas of single modules, by name or regular expression, in place of alpha."},
    )

    method_name = "NOLA"
    paper = "https://huggingface.co/papers/2310.02556"
    size_fields = ("num_basis",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.NOLA  # type: ignore[attr-defined]
        self.check_bias("nola_only")
        check_probability("nola_dropout", self.nola_dropout)
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
