"""Which parameters of a model an adapter adapts that are no layer's weight."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from .expert_layers import SeededExperts
from .layers import layer_kind

_SHOWN = 5  # names in a message


class Place(NamedTuple):
    """A parameter in a model.

    Attributes:
        module_name: of the module that has it, or of the layer that adapts it.
        layer: what is there: the module or the layer.
        parameter_name: in the module.
    """

    module_name: str
    layer: nn.Module
    parameter_name: str

    @property
    def base_layer(self) -> nn.Module:
        return self.layer.get_base_layer() if isinstance(self.layer, BaseTunerLayer) else self.layer

    @property
    def parameter(self) -> torch.Tensor:
        return self.base_layer.get_parameter(self.parameter_name)

    @property
    def name(self) -> str:
        return f"{self.module_name.removeprefix('_orig_mod.')}.{self.parameter_name}"

    @property
    def short_name(self) -> str:
        return ".".join(self.name.rsplit(".", 2)[-2:])

    def is_stack(self) -> bool:
        """Whether it has three dimensions, none of which is there for broadcasting alone (as in embeddings)."""
        return self.parameter.dim() == 3 and min(self.parameter.shape) > 1

    def is_experts(self) -> bool:
        """Whether the module says that it is a stack of experts."""
        module, number = self.base_layer, self.parameter.shape[0] if self.parameter.dim() else 0
        said = {getattr(module, name, None) for name in ("num_experts", "num_local_experts")}
        return self.is_stack() and (number in said or hasattr(module, "is_transposed"))


def places(model: nn.Module) -> Iterator[Place]:
    """The parameters of a model, by the modules that register them; those of adapters are left out."""
    inside: tuple[str, ...] = ()
    for module_name, module in model.named_modules():
        if not module_name or module_name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (f"{module_name}.",)
        base_layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        for name, _ in base_layer.named_parameters(recurse=False):
            yield Place(module_name, module, name)


def can_be_adapted(place: Place) -> bool:
    """Whether a parameter is a matrix, or a stack of matrices, of a module that is no layer of its own."""
    if layer_kind(place.base_layer) is not None or (
        isinstance(place.layer, BaseTunerLayer) and not isinstance(place.layer, SeededExperts)
    ):
        return False
    parameter = place.parameter
    if parameter.dim() == 3 and type(place.base_layer).__module__.startswith("torch.nn."):
        return False  # a convolution
    return parameter.dim() in (2, 3) and parameter.is_floating_point() and parameter.element_size() > 1


def resolve(peft_config: Any, model: nn.Module) -> list[Place]:
    """The parameters that a configuration adapts, in the order of the model; their names are put into it.

    `target_modules="all-linear"` stands for the experts too, and so does a name in `target_modules` of the module that
    holds them. What of a mixture is left out then, is said in a warning.

    Raises:
        ValueError: a parameter cannot be adapted, or dropout is wanted for it.
        NoMatchingPeftModuleError: a name in `target_parameters` matches nothing.
    """
    found = list(places(model))
    given = list(peft_config.target_parameters or [])
    everything = _is_all_linear(peft_config)
    chosen = [place for place in found if given and _is_named(peft_config, given, place)]
    _check_given(peft_config, given, found, chosen)
    if not given and not any(place.parameter.dim() == 3 for place in found):
        return []
    adaptable = [place for place in found if can_be_adapted(place)]
    implied = []
    if everything:
        implied = [place for place in adaptable if place.is_experts() and not _is_excluded(peft_config, place)]
    elif not isinstance(peft_config.target_modules, str):
        implied = [
            place
            for place in adaptable
            if place.is_stack() and check_target_module_exists(peft_config, place.module_name)
        ]
    implied = [place for place in implied if place not in chosen]
    if peft_config.dropout > 0 and (chosen or implied):
        field, first = f"{peft_config.method()}_dropout", (chosen + implied)[0]
        if chosen or not everything:
            raise ValueError(
                f"`{field}` must be 0 for parameters, which have no input to drop, got {peft_config.dropout} and "
                f"{first.name!r}. Leave {first.short_name!r} out, or set `{field}=0`."
            )
        implied = []
    chosen = [place for place in found if place in chosen or place in implied]
    _check_nesting(chosen)
    if implied:
        short = dict.fromkeys(place.short_name for place in implied)
        alike = [place for place in adaptable if _is_named(peft_config, list(short), place)]
        names = list(short) if all(place in chosen for place in alike) else [place.name for place in implied]
        peft_config.target_parameters = [*given, *names]
    _warn_of_others(peft_config, model, adaptable, chosen, everything)
    return chosen


def owners_of(names: Sequence[str], target_parameters: Sequence[str]) -> list[str]:
    """Which layer of a saved adapter has the coefficients of each adapted module or parameter.

    Args:
        names: of the adapted modules and parameters, in the order of the checkpoint.
        target_parameters: of its configuration.
    """
    is_parameter = [any(f".{name}".endswith(f".{each}") for each in target_parameters) for name in names]
    modules = [name.rpartition(".")[0] if inside else name for name, inside in zip(names, is_parameter)]
    depth: Counter[str] = Counter()
    owners = []
    for module, inside in zip(reversed(modules), reversed(is_parameter)):
        owners.append(module + ".base_layer" * depth[module])
        depth[module] += inside
    return owners[::-1]


def parameter_hint(module_name: str, module: nn.Module) -> str:
    """How to name the parameters of a module that is no layer, for a message; empty if none can be adapted."""
    names = [Place(module_name, module, name) for name, _ in module.named_parameters(recurse=False)]
    can = [place.short_name for place in names if can_be_adapted(place)]
    return f" Its parameters can be named in `target_parameters`: {', '.join(can)}." if can else ""


def _is_all_linear(peft_config: Any) -> bool:
    return isinstance(peft_config.target_modules, str) and peft_config.target_modules.lower() == "all-linear"


def _is_excluded(peft_config: Any, place: Place) -> bool:
    """Whether `exclude_modules` or `modules_to_save` name a parameter or its module."""
    everything = copy.copy(peft_config)
    everything.target_modules = ".*"
    return not all(check_target_module_exists(everything, name) for name in (place.name, place.module_name))


def _is_named(peft_config: Any, names: list[str], place: Place) -> bool:
    """Whether names stand for a parameter that is in the layers meant and is not excluded."""
    wanted = copy.copy(peft_config)
    wanted.target_modules = set(names)
    return bool(check_target_module_exists(wanted, place.name)) and not _is_excluded(peft_config, place)


def _check_given(peft_config: Any, given: list[str], found: list[Place], chosen: list[Place]) -> None:
    for name in given:
        named = [place for place in found if place.name == name or place.name.endswith(f".{name}")]
        if not named:
            can = dict.fromkeys(place.short_name for place in found if can_be_adapted(place))
            raise NoMatchingPeftModuleError(
                f"`target_parameters` must name parameters of the model, got {name!r}. Those that can be adapted here: "
                f"{', '.join(can) or 'none'}."
            )
    for place in chosen:
        if can_be_adapted(place):
            continue
        if layer_kind(place.base_layer) is not None:
            raise ValueError(
                f"`target_parameters` must name no parameter of a layer that is adapted as a whole, got {place.name!r} "
                f"of a {type(place.base_layer).__name__}: put {place.module_name.rpartition('.')[2]!r} into "
                "`target_modules`."
            )
        raise ValueError(
            f"`target_parameters` must name matrices, or stacks of matrices, of floating-point numbers, got "
            f"{place.name!r} with shape {tuple(place.parameter.shape)} and {place.parameter.dtype} in a "
            f"{type(place.layer).__name__}."
        )


def _check_nesting(chosen: list[Place]) -> None:
    """Layers around one module are nested, and files name them by their depth: all adapters must share the nest."""
    for module_name, layer in dict.fromkeys((place.module_name, place.layer) for place in chosen):
        if isinstance(layer, SeededExperts):
            names = [place.parameter_name for place in chosen if place.module_name == module_name]
            if names != layer.adapted_parameters():
                raise ValueError(
                    f"`target_parameters` must name the same parameters of {module_name!r} as the model's other "
                    f"adapters, {', '.join(layer.adapted_parameters())}, got {', '.join(names)}. Load the adapters "
                    "one at a time, each on a base model of its own (`unload()` gives it back)."
                )


def _warn_of_others(
    peft_config: Any, model: nn.Module, adaptable: list[Place], chosen: list[Place], everything: bool
) -> None:
    """Says what of a mixture of experts is left out though the configuration seems to mean it."""
    others = [place for place in adaptable if place not in chosen and not _is_excluded(peft_config, place)]
    stacks = [place for place in others if place.is_stack()]
    if everything:
        mixtures = {place.module_name.rpartition(".")[0] for place in adaptable if place.is_experts()}
        routers = [
            place
            for place in others
            if place.parameter.dim() == 2
            and place.module_name.rpartition(".")[0] in mixtures
            and not any(place.module_name == each.module_name for each in adaptable if each.is_stack())
        ]
        if stacks or routers:
            why = ""
            if peft_config.dropout > 0 and stacks:
                why = f" (Experts can be adapted without dropout alone: set `{peft_config.method()}_dropout=0`.)"
            warnings.warn(
                f"target_modules='all-linear' leaves out {_listed(stacks + routers)}, which are parameters and no "
                f"linear layers. To adapt them, name them in `target_parameters`; to be silent, in `exclude_modules`."
                f"{why}",
                stacklevel=2,
            )
        return
    if isinstance(peft_config.target_modules, str) or not stacks:
        return
    names = [name for name, _ in model.named_modules()]
    ends = {name[i:] for name in names for i in [0, *(i + 1 for i, letter in enumerate(name) if letter == ".")]}
    unmatched = sorted(set(peft_config.target_modules or ()) - ends)
    if unmatched:
        warnings.warn(
            f"`target_modules` names {', '.join(map(repr, unmatched))}, and no module is called that. The model keeps "
            f"its experts in parameters, which are left out: {_listed(stacks)}. To adapt them, name them in "
            "`target_parameters`.",
            stacklevel=2,
        )


def _listed(found: list[Place]) -> str:
    names = list(dict.fromkeys(place.short_name for place in found))
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(found)} parameters ({', '.join(names[:_SHOWN])}{more})"
