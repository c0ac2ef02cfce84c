"""What the configurations of all methods share."""

from __future__ import annotations

import dataclasses
import textwrap
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Optional, TypeVar, Union

import torch
from peft import PeftConfig
from peft.utils import PeftType

from .. import randomness
from ..checkpoint.identity import check_fingerprint
from ..checks import check_probability
from ..generators import Generator
from .description import DescribedConfig

C = TypeVar("C", bound=type[PeftConfig])


def documented(config: C) -> C:
    """Appends the fields of a configuration to its docstring, each with its type and its help."""
    lines = [textwrap.dedent(config.__doc__ or "").strip(), "", "Args:"]
    inherited = {each.name for each in dataclasses.fields(PeftConfig)}
    own = config.__dict__["__annotations__"]
    for each in sorted(dataclasses.fields(config), key=lambda each: each.name not in own):
        if each.name not in inherited:
            kind, optional = str(each.type), ""
            if kind.startswith("Optional["):
                kind, optional = kind.removeprefix("Optional[").removesuffix("]"), ", *optional*"
            lines.append(f"    {each.name} (`{kind}`{optional}):")
            lines += textwrap.wrap(each.metadata["help"], 108, initial_indent=8 * " ", subsequent_indent=8 * " ")
    lines += [
        "",
        "Raises:",
        "    ValueError: a field holds what it cannot; the message names the field, what was given",
    ]
    config.__doc__ = "\n".join([*lines, "        and what is allowed.", ""])
    return config


class Target(NamedTuple):
    """A module that an adapter adapts, as its coefficients see it.

    Attributes:
        name: of the module in the base model; empty for a whole network.
        fan_out: rows of its weight as a matrix.
        fan_in: columns.
        biases: numbers in its bias.
    """

    name: str
    fan_out: int
    fan_in: int
    biases: int = 0


@dataclass
class SeededConfig(DescribedConfig):
    """PEFT's standard fields, and those of an adapter whose weights are regenerated from a seed.

    A method subclasses this, names itself in `method_name`, declares a field `<method>_dropout`, and says what makes
    its weights.
    """

    seed: int = field(
        default=0,
        metadata={"help": "0 to 2**64 - 1. Frozen random numbers are drawn from it, alike on every machine."},
    )
    target_modules: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={
            "help": (
                "Names of the modules to adapt, a regular expression, or 'all-linear'. By default the query and value "
                "projections of known architectures. nn.Linear, Conv1D, nn.Conv2d, nn.Embedding and the quantized "
                "linear layers that PEFT knows can be adapted, by PRANC also modules that hold vectors only (norms)."
            )
        },
    )
    exclude_modules: Optional[Union[list[str], str]] = field(
        default=None, metadata={"help": "Names of modules, or a regular expression, to leave out."}
    )
    fan_in_fan_out: bool = field(
        default=False,
        metadata={"help": "The weight of a layer of unknown type is stored as (in, out). Known types are recognised."},
    )
    bias: str = field(
        default="none", metadata={"help": "Which biases are trained and saved: 'none', 'all' or '<method>_only'."}
    )
    modules_to_save: Optional[list[str]] = field(
        default=None,
        metadata={"help": "Modules that are trained and saved whole beside the adapter, such as a new classifier."},
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "Start with an update of zero (default), or with random coefficients (False; for tests)."},
    )
    layers_to_transform: Optional[Union[list[int], int]] = field(
        default=None, metadata={"help": "Adapt only the layers of these indexes."}
    )
    layers_pattern: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={"help": "Name of the nn.ModuleList that layers_to_transform indexes, such as 'layers' or 'h'."},
    )
    generator_version: int = field(
        default=randomness.GENERATOR_VERSION,
        metadata={"help": "Version of the random number specification. Leave it alone."},
    )
    fingerprint: Optional[str] = field(
        default=None,
        metadata={"help": "Written to checkpoints and checked when they are loaded. Leave it alone."},
    )
    target_shapes: Optional[dict[str, int]] = field(
        default=None,
        metadata={"help": "Written to checkpoints and checked when they are loaded. Leave it alone."},
    )

    size_fields: ClassVar[tuple[str, ...]]  # that the number of coefficients depends on

    @classmethod
    def method(cls) -> str:
        """The method's name in lower case, which its fields, parameters and attributes begin with."""
        return cls.method_name.lower()

    @property
    def dropout(self) -> float:
        """The probability of dropout on the input of the update."""
        return getattr(self, f"{self.method()}_dropout")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[self.method_name]
        self.seed = randomness.check_seed(self.seed)
        check_fingerprint(self.seed, self.generator_version, self.fingerprint)
        if self.bias not in ("none", "all", f"{self.method()}_only"):
            raise ValueError(f"`bias` must be 'none', 'all' or '{self.method()}_only', got {self.bias!r}.")
        check_probability(f"{self.method()}_dropout", self.dropout)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "`layers_to_transform` selects among named modules: it must be None when `target_modules` is a "
                f"string, got {self.layers_to_transform!r}."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"`layers_pattern` needs `layers_to_transform` to say which layers, got {self.layers_pattern!r} alone."
            )

    def generators(self, target: Target) -> tuple[Generator, ...]:
        """What makes the weights of an adapted module; each reads the next part of the module's coefficients."""
        raise NotImplementedError

    def initial(self, target: Target, generators: tuple[Generator, ...]) -> torch.Tensor:
        """The coefficients that a module, or a whole network, starts from: zeros, or random without `init_weights`."""
        size = sum(generator.num_coefficients for generator in generators)
        return torch.zeros(size) if self.init_weights else torch.randn(size)

    def network_generator(self, size: int, keep_basis: bool = False) -> Generator:
        """What makes the `size` parameters of a whole network.

        Args:
            keep_basis: keep a dense basis in memory that would be drawn again at every use.

        Raises:
            ValueError: the method makes no whole networks, or has more coefficients than there are parameters.
        """
        raise ValueError(
            "`config` must be a PrancConfig, or a McncConfig with apply_to='weight', to make a whole network, got "
            f"{type(self).__name__}."
        )

    def to_dict(self) -> dict[str, Any]:
        shapes = self.__dict__.get("_saved_shapes")  # set when an adapter's state is collected for saving
        return {
            **super().to_dict(),
            "fingerprint": randomness.fingerprint(self.seed, self.generator_version),
            "target_shapes": shapes or self.target_shapes,
        }
