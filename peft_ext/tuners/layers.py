"""What adapted layers share whatever generates their update: forward, merge, dtypes, quantized bases."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any, ClassVar, NoReturn, Union

import torch
from peft.tuners.tuners_utils import _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr
from torch import nn
from transformers.pytorch_utils import Conv1D

from . import idle
from .coefficients import Coefficients
from .config import SeededConfig
from .expansion import SharedExpansion
from .mixed import MixedBatch, Part
from .provenance import CheckpointedLayer
from .quantized import backend_of
from .reading import read
from .scaling import ScaledLayer
from .target import Target

Update = Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]
"""Of a weight: a matrix of shape `(fan_out, fan_in)`, or its factors A `(r, fan_in)` and B `(fan_out, r)`.

Those of experts have one more dimension, the first.
"""


def layer_kind(base_layer: nn.Module) -> str | None:
    """What kind of layer can be adapted, quantized or not.

    `"linear"`, `"conv2d"`, `"embedding"`, `"vector"` for a module that holds vectors only, such as the weight and bias
    of a norm, and otherwise `None`.
    """
    if isinstance(base_layer, (nn.Linear, Conv1D)):
        return "linear"
    if isinstance(base_layer, nn.Conv2d):
        return "conv2d"
    if isinstance(base_layer, nn.Embedding):
        return "embedding"
    backend = backend_of(base_layer)
    if backend is not None:
        return backend.layer_type
    parameters = list(base_layer.parameters(recurse=False))
    vectors = parameters and all(parameter.dim() == 1 for parameter in parameters)
    return "vector" if vectors and not list(base_layer.children()) else None


def _features(base_layer: nn.Module) -> tuple[int, int]:
    if layer_kind(base_layer) == "vector":
        return 1, sum(parameter.numel() for parameter in base_layer.parameters())
    in_features, out_features = _get_in_out_features(base_layer)
    if in_features is None or out_features is None:
        raise ValueError(f"Cannot tell the input and output sizes of a {type(base_layer).__name__}.")
    return in_features, out_features


def fans(base_layer: nn.Module) -> tuple[int, int]:
    """(fan_out, fan_in) of a layer that can be adapted: the shape of its weight as a matrix, inputs in the columns.

    For an embedding the inputs are the tokens; the vectors of a norm are one column.
    """
    fan_in, fan_out = _features(base_layer)
    if isinstance(base_layer, nn.Conv2d):
        fan_in = base_layer.weight[0].numel()  # inputs of one group, times the kernel's size
    return fan_out, fan_in


def execution_device(base_layer: nn.Module) -> torch.device | None:
    """Where accelerate runs a layer whose weights are elsewhere in between; `None` for a layer that stays in place."""
    hook: Any = getattr(base_layer, "_hf_hook", None)
    if not getattr(hook, "offload", False):
        return None
    return torch.device(hook.execution_device if hook.execution_device is not None else "cpu")


def target_of(name: str, base_layer: nn.Module) -> Target:
    """A layer that can be adapted, as coefficients see it."""
    fan_out, fan_in = fans(base_layer)
    has_bias = layer_kind(base_layer) != "vector" and getattr(base_layer, "bias", None) is not None
    return Target(name, fan_out, fan_in, fan_out if has_bias else 0)


class SeededLayer(ScaledLayer, CheckpointedLayer, nn.Module):
    """A layer `W` with the update `scaling * M`, where a method makes M from a seed and coefficients.

    A method subclasses this once for its configuration and further attributes, and once more together with each of
    `SeededLinear`, `SeededConv2d` and `SeededEmbedding`. It provides `assemble`, and `add_adapter`, which fills
    `scaling`.
    What belongs to adapters is kept by adapter name in attributes that begin with the method's name, as PEFT wants it:
    `<method>_coefficients` (the container of the coefficients), `<method>_dropout` and
    `<method>_expansions`.
    """

    config_class: ClassVar[type[SeededConfig]]  # type: ignore[assignment]
    adds_to_weight: ClassVar[bool] = True  # for flat training, which knows PEFT's own methods by name
    more_layer_names: ClassVar[tuple[str, ...]] = ()  # further modules of coefficients by adapter name
    more_param_names: ClassVar[tuple[str, ...]] = ()  # further dictionaries by adapter name
    mixed: MixedBatch | None = None  # set for the time of a pass whose rows have adapters of their own
    fan_in: int  # columns of M
    fan_out: int  # rows of M
    experts = 1  # matrices that M is a stack of

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "config_class" in cls.__dict__:
            method = cls.config_class.method()
            cls.adapter_layer_names = (f"{method}_coefficients", *cls.more_layer_names)
            names = (*cls.record_names, "dropout", "expansions")
            named = (f"{method}_{name}" for name in names)
            cls.other_param_names = ("scaling", "initial_scaling", "tied_to", *named, *cls.more_param_names)

    def __init__(self, base_layer: nn.Module, fan_in_fan_out: bool = False, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        for name, empty in (("coefficients", Coefficients()), ("dropout", nn.ModuleDict()), ("expansions", {})):
            setattr(self, f"{self.method}_{name}", empty)
        self.make_records()
        self.quantization_backend = backend_of(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self._measure()
        self.scaling: dict[str, float] = {}
        self.initial_scaling: dict[str, float] = {}
        self.tied_to: dict[str, SeededLayer] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self.cast_input_dtype_enabled = True
        # A Conv1D weight is stored (in, out), an nn.Linear weight (out, in); the configuration speaks for the others.
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D) or (
            fan_in_fan_out and not isinstance(self.get_base_layer(), nn.Linear)
        )

    def _measure(self) -> None:
        """Notes the sizes of the base layer."""
        self.in_features, self.out_features = _features(self.get_base_layer())
        self.fan_out, self.fan_in = fans(self.get_base_layer())

    def target(self, name: str) -> Target:
        """The base layer as coefficients see it, under the name that their streams are drawn by."""
        return target_of(name, self.get_base_layer())

    @property
    def stack(self) -> tuple[int, ...]:
        """The dimensions of M before rows and columns: none, or the number of experts."""
        return (self.experts,) if self.experts > 1 else ()

    @property
    def coefficients(self) -> Coefficients:
        """The container of the coefficients that this layer owns, by adapter name."""
        return getattr(self, f"{self.method}_coefficients")

    def container(self, adapter: str) -> Coefficients | None:
        """What holds the coefficients of an adapter, by its name; `None` if the adapter does not adapt this layer."""
        if adapter in self.tied_to:
            return self.tied_to[adapter].container(adapter)
        return self.coefficients if adapter in self.coefficients else None

    def _get_available_adapters(self) -> set[str]:
        return super()._get_available_adapters() | self.tied_to.keys()

    def make_container(self, adapter: str, coefficients: torch.Tensor) -> Coefficients:
        """Puts the first coefficients of an adapter into this layer's own container, which it returns."""
        self.coefficients[adapter] = nn.Parameter(coefficients.to(torch.get_default_dtype()))
        return self.coefficients

    @property
    def expansions(self) -> dict[str, tuple[SharedExpansion, ...]]:
        """What makes the weights from the coefficients, by adapter name."""
        return getattr(self, f"{self.method}_expansions")

    @property
    def dropout(self) -> nn.ModuleDict:
        return getattr(self, f"{self.method}_dropout")

    def update_layer(
        self,
        adapter_name: str,
        config: Any,
        target: Target,
        expansions: dict[Any, SharedExpansion],
        inference_mode: bool = False,
    ) -> None:
        """Adds an adapter to this layer.

        Args:
            target: the base layer; its name names the layer's own basis if none is shared.
            expansions: those of the adapter's other layers, joined or added to.
        """
        self.dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout > 0 else nn.Identity()
        self.expansions[adapter_name] = self.add_adapter(adapter_name, config, target, expansions)
        self.initial_scaling[adapter_name] = self.scaling[adapter_name]
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device or execution_device(self.get_base_layer()))

    @abstractmethod
    def add_adapter(
        self, adapter_name: str, config: Any, target: Target, expansions: dict[Any, SharedExpansion]
    ) -> tuple[SharedExpansion, ...]:
        """Makes the scaling and the coefficients of an adapter, and returns what expands them.

        Args:
            target: the base layer.
            expansions: those of the adapter's other layers, joined or added to.
        """

    def update(self, adapter: str) -> tuple[Update, torch.Tensor | None]:
        """M, and what is added to the bias, of shape `(fan_out,)`, if anything is; in the dtype of the coefficients."""
        container = self.container(adapter)
        assert container is not None
        return self._assembled(adapter, [expand(container) for expand in self.expansions[adapter]])

    def linear_update(self, adapter: str) -> tuple[Update, torch.Tensor | None]:
        """What `update` returns; a ValueError where the output of the layer is not linear in it."""
        return self.update(adapter)

    def _assembled(self, adapter: str, weights: list[torch.Tensor]) -> tuple[Update, torch.Tensor | None]:
        """What `assemble` makes of weights, of a tied layer the transpose of what its source makes of them."""
        source = self.tied_to.get(adapter)
        if source is None:
            return self.assemble(adapter, weights)
        update, _ = source.assemble(adapter, weights)
        return ((update[1].mT, update[0].mT) if isinstance(update, tuple) else update.mT), None

    def tie(self, adapter: str, source: SeededLayer, dropout: float) -> None:
        """Gives an adapter of a layer to another one, whose base weight is the same: the update stays one and the same.

        Args:
            source: an embedding; this is the linear layer that has its weight.
        """
        self.tied_to[adapter] = source
        self.scaling[adapter], self.initial_scaling[adapter] = source.scaling[adapter], source.initial_scaling[adapter]
        self.dropout[adapter] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.expansions[adapter] = source.expansions[adapter]
        self.provenances[adapter] = source.provenances[adapter]
        self.set_adapter(self.active_adapters)

    @abstractmethod
    def assemble(self, adapter: str, weights: list[torch.Tensor]) -> tuple[Update, torch.Tensor | None]:
        """What `update` returns, from the weights that the expansions of an adapter have made, of their `shape`.

        The weights may all have one more dimension, the first, of adapters; what is returned has it then too.
        """

    def _factors(self, A: torch.Tensor, B: torch.Tensor, r: int) -> Update:
        """A `(..., r, fan_in)` and B `(..., fan_out, r)`, with a dimension for experts, from their numbers in a row."""
        several = (*A.shape[:-1], *self.stack)
        return A.reshape(*several, r, self.fan_in), B.reshape(*several, self.fan_out, r)

    def get_base_weight(self) -> torch.Tensor:
        if getattr(getattr(self.get_base_layer().weight, "quant_state", None), "packing_format_for_cpu", False):
            # In evaluation on a CPU, bitsandbytes rearranges 4-bit weights, and what dequantizes them does not know.
            self.get_base_layer().state_dict()  # puts them back
        return super().get_base_weight()

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The update `scaling * M` in the shape of the base weight and the dtype of the coefficients."""
        return self._delta_weight(adapter, self.update(adapter)[0])

    def _delta_weight(self, adapter: str, update: Update) -> torch.Tensor:
        if isinstance(update, tuple):
            A, B = update
            dtype = torch.promote_types(A.dtype, torch.float32)  # half precision products are slow and coarse on a CPU
            return self._to_weight((B.to(dtype) @ A.to(dtype)) * self.scaling[adapter]).to(A.dtype)
        return self._to_weight(self._scaled(adapter, update))

    @property
    def weight(self) -> torch.Tensor:
        """The weight with the updates of the active adapters, for code that reads it and does not call the layer."""
        self._follow()
        return read(self, "weight", super().weight)

    @property
    def bias(self) -> torch.Tensor:
        """The bias, likewise."""
        self._follow()
        return read(self, "bias", super().bias)

    def parameter_updates(self, adapter: str) -> dict[str, torch.Tensor]:
        """What an adapter adds to the parameters of the base layer, by name, in their shapes."""
        update, bias = self.update(adapter)
        return {
            "weight": self._delta_weight(adapter, update),
            **({} if bias is None else {"bias": self._scaled(adapter, bias)}),
        }

    def adapts(self, adapter: str, parameter: str) -> bool:
        """Whether `parameter_updates` has one for a parameter."""
        return parameter == "weight"

    @abstractmethod
    def _to_weight(self, delta: torch.Tensor) -> torch.Tensor:
        """Brings `(fan_out, fan_in)` into the shape of the base weight."""

    @abstractmethod
    def _adapted(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The output of the layer with the updates of some adapters, at least one."""

    def _dtype(self, adapter: str) -> torch.dtype:
        container = self.container(adapter)
        assert container is not None
        return container[adapter].dtype

    def _scaled(self, adapter: str, update: torch.Tensor) -> torch.Tensor:
        scaling = self.scaling[adapter]
        return update if scaling == 1 else update * scaling

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        before = self.active_adapters
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        for adapter in before:
            if adapter not in self.active_adapters:
                for expansion in self.expansions.get(adapter, ()):
                    idle.keep(expansion.kept)

    def _scaling_of(self, part: Part) -> float | torch.Tensor:
        """The scaling of every row, of shape `(rows, 1)` if they differ."""
        scalings = [self.scaling[adapter] for adapter in part.adapters]
        if len(set(scalings)) == 1:
            return scalings[0]
        return part.weights[0].new_tensor(scalings)[:, None]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.mixed is not None:
            self.mixed.check(x)
            if self.merged:
                raise ValueError(
                    "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
                )
            if not self.disable_adapters:
                return self._mixed(self.mixed, x, *args, **kwargs)
        self._follow()
        active = [adapter for adapter in self.active_adapters if self.container(adapter) is not None]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        return self._adapted(active, x, *args, **kwargs)

    @abstractmethod
    def _mixed(self, batch: MixedBatch, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The output of the layer for rows that have adapters of their own."""

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the updates of adapters to the base weight.

        Args:
            safe_merge: merge into a copy first and keep it only if it is finite.
            adapter_names: which adapters; the active ones by default.

        Raises:
            ValueError: `safe_merge` and the merged weight or bias is not finite: the adapter is then not merged; or the
                layer normalises its weight when it is called (`max_norm`).
            TypeError: the layer makes its weight anew whenever it is called.
        """
        base = self.get_base_layer()
        if getattr(base, "max_norm", None) is not None:
            raise ValueError(
                "An embedding with `max_norm` changes the rows that it looks up, and a merged update with them: use "
                "the adapter unmerged."
            )
        if self.quantization_backend is None and self.parameter_name not in base._parameters:
            self._refuse_to_merge()
        for adapter in check_adapters_to_merge(self, adapter_names):
            if self.container(adapter) is None:
                continue
            self._add_to_base(adapter, 1, safe_merge)
            self.merged_adapters.append(adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes the updates of the merged adapters off the base weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            source = self._merged_with(adapter)
            if source is not None and adapter in source.merged_adapters:
                source.unmerge()
            elif source is None and self.container(adapter) is not None:
                self._add_to_base(adapter, -1, False)

    def _merged_with(self, adapter: str) -> SeededLayer | None:
        """The layer whose weight is this one's too, and which an adapter is merged into for both; `None` for most."""
        source = self.tied_to.get(adapter)
        return source if source is not None and source.get_base_layer().weight is self.get_base_layer().weight else None

    def _follow(self) -> None:
        """Takes off merged updates while adapters are disabled, also where another layer has the same weight."""
        for adapter in [adapter for adapter in self.merged_adapters if adapter in self.tied_to]:
            source = self._merged_with(adapter)
            if source is not None and adapter not in source.merged_adapters:
                self.merged_adapters.remove(adapter)
        if self.disable_adapters and self.merged:
            self.unmerge()

    def _add_to_base(self, adapter: str, sign: int, safe: bool) -> None:
        if self._merged_with(adapter) is not None:
            return  # the source does it for both
        weight = self.get_base_weight()
        update, bias_update = self.update(adapter)
        bias: Any = getattr(self.get_base_layer(), "bias", None)
        if bias_update is not None:
            merged_bias = (bias + sign * self._scaled(adapter, bias_update).to(bias.device)).to(bias.dtype)
            self._check_merged(merged_bias, safe, adapter)
        delta = sign * self._delta_weight(adapter, update)
        merged = (weight + delta.to(weight.device)).to(weight.dtype)
        self._check_merged(merged, safe, adapter)
        self.set_base_weight(merged)
        if self.quantization_backend is None and self.get_base_weight().data_ptr() != merged.data_ptr():
            self._refuse_to_merge()
        if bias_update is not None:
            bias.data = merged_bias

    def _refuse_to_merge(self) -> NoReturn:
        base = self.get_base_layer()
        parameter = getattr(base, self.parameter_name)
        raise TypeError(
            f"The {self.parameter_name} of a {type(base).__name__}, a {type(parameter).__name__}, cannot be changed: "
            "merging has no effect. Use the adapter unmerged, or merge it into the model before that is quantized, "
            "normalised or pruned."
        )

    def _check_merged(self, merged: torch.Tensor, safe: bool, adapter: str) -> None:
        if safe and not torch.isfinite(merged).all():
            raise ValueError(
                f"NaN or infinity in the merged weights: adapter {adapter!r} seems to be broken. The base weights "
                "are unchanged."
            )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` gets this layer right; `peft_ext.to_lora` takes more kinds of layers."""
        return False

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return f"{self.method}.{super().__repr__()}"
