"""Configuration of PRANC."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from peft.utils import PeftType

from ...checks import check_choice, check_positive_integer, check_probability
from ...generators import RandomBasis, SparseBasis
from ...generators.linear import LinearGenerator
from ..config import SeededConfig


@dataclass
class PrancConfig(SeededConfig):
    """
    Configuration of a [`PrancModel`]: one short vector of coefficients for the updates of all target weights together.

    Paper: Nooralinejad et al., "PRANC: Pseudo RAndom Networks for Compacting deep models",
    https://huggingface.co/papers/2206.08464. Every weight is updated by `basis @ coefficients / sqrt(fan_in)`, where
    the basis is random, frozen and regenerated from the seed. All layers read the same vector, so its length does not
    depend on the model.

    Args:
        num_coefficients (`int`):
            Length of the vector, that is the number of trained parameters. At most the number of target weights.
        basis (`str`):
            `"sparse"` (default): every weight reads `nnz` coefficients with random signs, each coefficient is read by
            equally many weights of a layer; four bytes a weight and number read are kept in memory. `"dense"`, as
            published: every weight reads all of them with random factors of variance `1 / num_coefficients`, drawn
            again at every use: steps take `num_coefficients` random numbers a weight, twice.
        nnz (`int`):
            Coefficients that a weight reads with the sparse basis.
        adapt_bias (`bool`):
            Update the biases of the target layers too. (Name norms in `target_modules` to update their weights.)
        pranc_dropout (`float`):
            Dropout probability on the input of the update.
        seed (`int`):
            0 to 2**64 - 1. The basis is drawn from it, alike on every machine.
        target_modules (`Union[list[str], str]`, *optional*):
            Names of the modules to adapt, a regular expression, or `"all-linear"`. By default the query and value
            projections of known architectures. `nn.Linear`, `Conv1D`, `nn.Conv2d`, `nn.Embedding`, modules that hold
            vectors only (norms) and the quantized linear layers that PEFT knows can be adapted.
        exclude_modules (`Union[list[str], str]`, *optional*):
            Names of modules, or a regular expression, to leave out.
        fan_in_fan_out (`bool`):
            The weight of a layer of unknown type is stored as (in, out). Known types are recognised.
        bias (`str`):
            Which biases are trained and saved whole: `"none"`, `"all"` or `"pranc_only"`.
        modules_to_save (`list[str]`, *optional*):
            Modules that are trained and saved whole beside the adapter, such as a new classifier.
        init_weights (`bool`):
            Start with an update of zero (default), or with random coefficients (`False`; for tests).
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

    num_coefficients: int = field(
        default=10_000,
        metadata={"help": "Length of the one vector that all layers read, that is the number of trained parameters."},
    )
    basis: str = field(
        default="sparse",
        metadata={
            "help": (
                "'sparse': every weight reads nnz coefficients with random signs. 'dense', as published: every weight "
                "reads all of them with random factors, drawn again at every use, which is slow."
            )
        },
    )
    nnz: int = field(default=1, metadata={"help": "Coefficients that a weight reads with the sparse basis."})
    adapt_bias: bool = field(default=False, metadata={"help": "Update the biases of the target layers too."})
    pranc_dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the input of the update."})

    method_name = "PRANC"
    paper = "https://huggingface.co/papers/2206.08464"
    size_fields = ("num_coefficients",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PRANC  # type: ignore[attr-defined]
        self.check_bias("pranc_only")
        check_probability("pranc_dropout", self.pranc_dropout)
        check_positive_integer("num_coefficients", self.num_coefficients)
        check_choice("basis", self.basis, ("sparse", "dense"))
        check_positive_integer("nnz", self.nnz)
        if self.nnz > self.num_coefficients:
            raise ValueError(
                f"`nnz` must be at most `num_coefficients` ({self.num_coefficients}), the coefficients that a weight "
                f"can read, got {self.nnz}."
            )

    def generator(
        self, stream: tuple[str | int, ...], size: int, fan_in: int, keep_basis: bool = False
    ) -> LinearGenerator:
        """What makes `size` weights, with a variance of `1 / fan_in` where that of the coefficients is 1.

        Args:
            stream: name of the basis.
            size: number of weights.
            fan_in: inputs of the layer that the weights belong to.
            keep_basis: keep a dense basis in memory.
        """
        k, version = self.num_coefficients, self.generator_version
        if self.basis == "dense":
            scale = math.sqrt(3 / (k * fan_in))
            return RandomBasis(self.seed, stream, k, size, scale=scale, streamed=not keep_basis, version=version)
        return SparseBasis(self.seed, stream, k, size, scale=1 / math.sqrt(fan_in), nnz=self.nnz, version=version)
