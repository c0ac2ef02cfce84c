"""What the configurations of all methods share."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Optional, TypeVar, Union

import torch
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, PeftType

from .. import randomness
from ..checkpoint.identity import check_fingerprint, check_identity, unfold_names
from ..checkpoint.quantization import DTYPES, Layout
from ..checks import check_choice, check_probability, check_types, declared_type
from ..generators import Generator
from .description import DescribedConfig
from .network import Filling, network_rows
from .target import Target, shape_counts

C = TypeVar("C", bound=type[PeftConfig])


def documented(config: C) -> C:
    """Appends the fields of a configuration to its docstring, each with its type and its help."""
    lines = [textwrap.dedent(config.__doc__ or "").strip(), "", "Args:"]
    inherited = {each.name for each in dataclasses.fields(PeftConfig)}
    own = config.__dict__["__annotations__"]
    for each in sorted(dataclasses.fields(config), key=lambda each: each.name not in own):
        if each.name not in inherited:
            kind = declared_type(each)
            optional = "" if kind == each.type else ", *optional*"
            lines.append(f"    {each.name} (`{kind}`{optional}):")
            lines += textwrap.wrap(each.metadata["help"], 108, initial_indent=8 * " ", subsequent_indent=8 * " ")
    lines += [
        "",
        "Raises:",
        "    ValueError: a field holds what it cannot; the message names the field, what was given",
    ]
    config.__doc__ = "\n".join([*lines, "        and what is allowed.", ""])
    return config


PLAIN, SCALED = "plain", "scaled"

ELSEWHERE = (
    "Export the adapters with `peft_ext.to_lora` and combine those with LoRA's `add_weighted_adapter`; or activate "
    "them together and call `set_scale(adapter, weight)` of their layers, which adds the weighted updates exactly."
)
"""What to do with adapters whose coefficients cannot be combined."""

_MOST_ENTRIES = 10_000  # in a field: PEFT looks at them all for every module


def _refuse_pickle(folder: Path, what_to_do: str) -> None:
    if (folder / WEIGHTS_NAME).exists() and not (folder / SAFETENSORS_WEIGHTS_NAME).exists():
        raise ValueError(
            f"The weights of an adapter must be in {SAFETENSORS_WEIGHTS_NAME}, got {WEIGHTS_NAME} in {str(folder)!r}, "
            f"a pickle, which is not read. {what_to_do}."
        )


def weighted_sum(vectors: Sequence[torch.Tensor], factors: Sequence[float]) -> torch.Tensor:
    """The sum of vectors, each times a factor, on the device of the first."""
    return sum(vector.to(vectors[0].device) * factor for vector, factor in zip(vectors, factors))  # type: ignore[return-value]


@dataclass
class CheckpointedConfig(DescribedConfig):
    """PEFT's standard fields, and those that say and verify what a checkpoint holds.

    A method names itself in `method_name`. Its fields that turn coefficients into weights have `generates` in their
    metadata: they are part of the adapter's identity.
    """

    coefficient_dtype: str = field(
        default="float32",
        metadata={
            "help": (
                "What the coefficients are saved in: 'float32', 'bfloat16', 'float16', 'int8' or 'int4' (symmetric, "
                "128 numbers share a scale). They are trained in float32, also after loading."
            )
        },
    )
    identity: Optional[dict[str, Any]] = field(
        default=None,
        metadata={"help": "Written to checkpoints and checked when they are loaded. Leave it alone."},
    )
    target_shapes: Optional[dict[str, int]] = field(
        default=None,
        metadata={"help": "Written to checkpoints and checked when they are loaded. Leave it alone."},
    )
    target_names: Optional[list[str]] = field(
        default=None,
        metadata={"help": "Names of the adapted modules, written to checkpoints. Leave it alone."},
    )
    coefficient_error: Optional[float] = field(
        default=None,
        metadata={
            "help": (
                "Norm of what saving in `coefficient_dtype` changed, relative to that of the coefficients, written to "
                "checkpoints. Leave it alone."
            )
        },
    )
    base_fingerprint: Optional[str] = field(
        default=None,
        metadata={
            "help": (
                "A hash of samples of the adapted base weights, written to checkpoints; loading warns if they have "
                "changed. Leave it alone."
            )
        },
    )

    size_fields: ClassVar[tuple[str, ...]]  # that the number of coefficients depends on

    @classmethod
    def method(cls) -> str:
        """The method's name in lower case, which its fields, parameters and attributes begin with."""
        return cls.method_name.lower()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[self.method_name]
        self.check()
        saved = [
            name for name in ("target_shapes", "target_names", "base_fingerprint") if getattr(self, name) is not None
        ]
        if self.identity is not None:
            check_identity(self.identity, self.generating(), "in adapter_config.json")
        elif saved:
            raise ValueError(
                f"`identity` must be there beside `{saved[0]}`, which only saved adapters have: it was taken out of "
                "adapter_config.json. Load the adapter with the configuration that was saved with it, unedited."
            )
        if self.target_names is not None:
            unfold_names(self.target_names)

    def check(self) -> None:
        """Raises a ValueError, which names the field, for what a field cannot be; fields can be changed later."""
        try:
            self.check_fields()
        except (AttributeError, TypeError):
            check_types(self)  # says which field is to blame, if one is
            raise
        check_types(self)
        check_choice("coefficient_dtype", self.coefficient_dtype, DTYPES)
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if isinstance(value, (list, tuple, set, dict)) and len(value) > _MOST_ENTRIES:
                raise ValueError(f"`{each.name}` must have at most {_MOST_ENTRIES:,} entries, got {len(value):,}.")

    def check_fields(self) -> None:
        """Brings fields into their final form and raises a ValueError, which names the field, for what it cannot be."""

    def generating(self) -> dict[str, Any]:
        """The method's name and all fields that turn coefficients into weights."""
        fields = [each.name for each in dataclasses.fields(self) if each.metadata.get("generates")]
        return {"method": self.method_name, **{name: getattr(self, name) for name in fields}}

    def described(self, target: Target) -> list[Any]:
        """What the identity says of an adapted module."""
        return [target.name, target.fan_out, target.fan_in, *([target.experts] if target.experts > 1 else [])]

    def kinds(self, size: int) -> list[torch.Tensor]:
        """Places of the coefficients of each kind among the `size` of a module: kinds share no scale when packed."""
        return [torch.arange(size)]

    def layout(self, sizes: Sequence[int]) -> Layout:
        """How vectors of so many coefficients are packed."""
        return Layout([self.kinds(size) for size in sizes])

    def vector_sizes(self, targets: Sequence[Target]) -> list[int]:
        """Numbers in every vector of coefficients that is saved for some adapted modules, in their order."""
        raise NotImplementedError

    def check_sizes(self, targets: Sequence[Target]) -> None:
        """Verifies that what the configuration asks for is in proportion to the modules, before anything is drawn.

        Raises:
            ValueError: it is not, with the field, the number and the bound.
        """

    def saved_facts(self, targets: Sequence[Target]) -> dict[str, Any]:
        """What else a checkpoint tells its readers of the adapted modules."""
        return {"target_shapes": shape_counts(targets)}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Reads `adapter_config.json` of a folder or hub repository.

        Raises:
            ValueError: the fields do not fit their identity, or the weights beside them are a pickle.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        _refuse_pickle(folder, "Save the adapter again with `save_pretrained`")
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes `adapter_config.json`, and describes the adapter in the model card beside it.

        Raises:
            ValueError: the weights were saved as a pickle, with `safe_serialization=False`.
        """
        _refuse_pickle(Path(save_directory), "`safe_serialization` must be True")
        super().save_pretrained(save_directory, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        saved = self.__dict__.get("_saved", {})  # set when an adapter's state is collected for saving
        return {**super().to_dict(), **saved}


@dataclass
class SeededConfig(CheckpointedConfig):
    """The fields of an adapter whose weights are regenerated from a seed.

    A method subclasses this, declares a field `<method>_dropout`, and says what makes its weights.
    """

    seed: int = field(
        default=0,
        metadata={
            "help": "0 to 2**64 - 1. Frozen random numbers are drawn from it, alike on every machine.",
            "generates": True,
        },
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
    target_parameters: Optional[list[str]] = field(
        default=None,
        metadata={
            "help": (
                "Names of parameters to adapt that are no layer's weight, such as 'mlp.experts.gate_up_proj': the "
                "experts of a mixture, stacked in three dimensions, or a router's matrix. They are adapted beside "
                "`target_modules`, whose defaults target_modules=[] leaves out. 'all-linear' and the name of the "
                "module that holds experts ('experts') adapt them too. Dropout cannot be applied to them."
            )
        },
    )
    exclude_modules: Optional[Union[list[str], str]] = field(
        default=None, metadata={"help": "Names of modules, or a regular expression, to leave out."}
    )
    fan_in_fan_out: bool = field(
        default=False,
        metadata={
            "help": (
                "The weight of a layer of unknown type is stored as (in, out), or (experts, in, out). Known types are "
                "recognised."
            ),
            "generates": True,
        },
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
    ensure_weight_tying: bool = field(
        default=False,
        metadata={
            "help": (
                "Where input and output embeddings share their weight and one of them is a target, or is in "
                "modules_to_save: adapt, or train, the input embedding and let the output embedding have the same."
            )
        },
    )
    parametrization: Optional[str] = field(
        default=None,
        metadata={
            "help": (
                "'scaled' (default): coefficients are multiplied by fixed factors, computed from the sizes, with which "
                "a learning rate that suits LoRA suits them, and MCNC cuts A and B into chunks apart. 'plain': as in "
                "adapters that were saved before there was a choice; every method and size needs a learning rate of "
                "its own."
            ),
            "generates": True,
        },
    )
    factors_version: Optional[int] = field(
        default=None,
        metadata={
            "help": (
                "Version of the rule for the fixed factors, and for defaults that depend on it, where coefficients "
                "are scaled: the newest one, or that of a saved adapter. Leave it alone."
            )
        },
    )
    generator_version: int = field(
        default=randomness.GENERATOR_VERSION,
        metadata={"help": "Version of the random number specification. Leave it alone.", "generates": True},
    )
    fingerprint: Optional[str] = field(
        default=None,
        metadata={"help": "Written to checkpoints and checked when they are loaded. Leave it alone."},
    )

    factors_versions: ClassVar[tuple[int, ...]] = ()  # that can be read, oldest first; none if there is one rule only

    @property
    def dropout(self) -> float:
        """The probability of dropout on the input of the update."""
        return getattr(self, f"{self.method()}_dropout")

    def check_fields(self) -> None:
        self.seed = randomness.check_seed(self.seed)
        check_fingerprint(self.seed, self.generator_version, self.fingerprint)
        if self.bias not in ("none", "all", f"{self.method()}_only"):
            raise ValueError(f"`bias` must be 'none', 'all' or '{self.method()}_only', got {self.bias!r}.")
        check_probability(f"{self.method()}_dropout", self.dropout)
        if self.parametrization is None:
            self.parametrization = SCALED if self.identity is None else PLAIN
        check_choice("parametrization", self.parametrization, (SCALED, PLAIN))
        self._check_factors_version()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if isinstance(self.target_parameters, (set, tuple)):
            self.target_parameters = sorted(self.target_parameters)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "`layers_to_transform` selects among named modules: it must be None when `target_modules` is a "
                f"string, here {self.target_modules!r}, got {self.layers_to_transform!r}."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"`layers_pattern` needs `layers_to_transform` to say which layers, got {self.layers_pattern!r} alone."
            )

    @property
    def rule(self) -> Optional[int]:
        """The `factors_version` in use; None where nothing is scaled or there was one rule only."""
        known = self.factors_versions if self.parametrization == SCALED else ()
        return (self.factors_version or known[-1]) if known else None

    def _check_factors_version(self) -> None:
        """Brings the version into its final form: that of a saved adapter, or the newest one."""
        known = self.factors_versions
        if self.factors_version is None:
            saved = (self.identity or {}).get("factors_version")
            self.factors_version = saved if saved in known else None  # others are refused with the identity
        if self.parametrization == SCALED and self.factors_version not in (None, *known):
            names = " or ".join(map(str, known)) or "left out"
            raise ValueError(f"`factors_version` must be {names}, got {self.factors_version!r}.")
        self.factors_version = self.rule

    def generating(self) -> dict[str, Any]:
        found = super().generating()
        if self.ensure_weight_tying:
            found["ensure_weight_tying"] = True
        if self.parametrization == PLAIN:
            del found["parametrization"]  # adapters from before there was a choice know no such field
        elif self.rule is not None:
            found["factors_version"] = self.rule
        return found

    def factors(self, target: Target) -> list[float]:
        """What the coefficients of each of the `kinds` of a module are multiplied by before they are used.

        With LoRA's learning rate, one step of Adam then changes the loss by as much, to first order, as one of LoRA.
        Adam moves every parameter by about the learning rate. Where `N` numbers are independent, the change of the
        loss is the sum of the absolute values of their gradients, of the order of `N` times a gradient's root mean
        square; a coefficient that `N / k` of them share, with random signs or weights, has a gradient that is only
        `sqrt(N / k)` times as large, and there are `k`. The factor `sqrt(N / k)` makes up for that.
        """
        return self.chosen(self.scaled_factors(target))

    def chosen(self, factors: list[float]) -> list[float]:
        """The factors, or ones with the plain parametrization."""
        return factors if self.parametrization == SCALED else [1.0 for _ in factors]

    def scaled_factors(self, target: Target) -> list[float]:
        """The factors of a scaled adapter, one for each of the `kinds`; 1 unless a method says how it is scaled."""
        return [1.0 for _ in self.kinds(0)]

    def generators(self, target: Target) -> tuple[Generator, ...]:
        """What makes the weights of an adapted module; each reads the next part of the module's coefficients."""
        raise NotImplementedError

    def vector_sizes(self, targets: Sequence[Target]) -> list[int]:
        return [sum(generator.num_coefficients for generator in self.generators(target)) for target in targets]

    def initial(self, target: Target, generators: tuple[Generator, ...]) -> torch.Tensor:
        """The coefficients that a module starts from: zeros, or random without `init_weights`."""
        size = sum(generator.num_coefficients for generator in generators)
        if self.init_weights:
            return torch.zeros(size)
        return self.unscaled(torch.randn(size), target)

    def unscaled(self, coefficients: torch.Tensor, target: Target) -> torch.Tensor:
        """The coefficients of a module that are these when they are multiplied by their factors; changed in place."""
        for places, factor in zip(self.kinds(len(coefficients)), self.factors(target)):
            coefficients[places] /= factor
        return coefficients

    def combined(self, vectors: Sequence[torch.Tensor], factors: Sequence[float]) -> torch.Tensor:
        """The coefficients of a module that LoRA's `linear` combination of some adapters has.

        Args:
            vectors: its coefficients in every adapter.
            factors: what the update of every adapter is multiplied by.

        Raises:
            ValueError: no coefficients give that combination, which is so unless a method says how.
        """
        raise ValueError(f"Coefficients of {self.method_name} cannot be combined. {ELSEWHERE}")

    def network_fillings(self, targets: Sequence[Target], keep_basis: bool = False) -> tuple[Filling, ...]:
        """What makes the updates of the parameters of a whole network.

        Args:
            targets: the parameters, vectors as columns.
            keep_basis: keep a dense basis in memory that would be drawn again at every use.

        Raises:
            ValueError: the method makes no whole networks, or is out of proportion to this one.
        """
        raise ValueError(f"`config` must be a NolaConfig, a PrancConfig or a McncConfig, got {type(self).__name__}.")

    def network_rows(self, targets: Sequence[Target]) -> dict[str, str]:
        return network_rows(self.network_fillings(targets))

    def network_initial(self, fillings: Sequence[Filling]) -> torch.Tensor:
        """The coefficients that a whole network starts from; see `initial`."""
        sizes = [filling.generator.num_coefficients for filling in fillings]
        if self.init_weights:
            return torch.zeros(sum(sizes))
        return torch.cat([torch.randn(size) / filling.factors[0] for size, filling in zip(sizes, fillings)])

    def to_dict(self) -> dict[str, Any]:
        # Fields that these follow from may have been set since.
        fingerprint = randomness.fingerprint(self.seed, self.generator_version)
        return {**super().to_dict(), "fingerprint": fingerprint, "factors_version": self.rule}
