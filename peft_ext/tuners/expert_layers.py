"""Adapted parameters of modules that are no known layers: the experts of a mixture, the matrix of a router."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from ..generators.base import autocast_off
from .layers import SeededLayer, Update
from .mixed import BASE, MixedBatch
from .target import Target


def stored_transposed(base_layer: nn.Module, parameter: torch.Tensor, fan_in_fan_out: bool) -> bool:
    """Whether a parameter is stored as (experts, in, out), or a matrix as (in, out), rather than with `out` first.

    transformers marks modules of experts with `is_transposed`; the configuration speaks for others.
    """
    marked = getattr(base_layer, "is_transposed", None) if parameter.dim() == 3 else None
    return fan_in_fan_out if marked is None else bool(marked)


def parameter_target(name: str, base_layer: nn.Module, fan_in_fan_out: bool) -> Target:
    """A parameter of two or three dimensions as coefficients see it.

    Args:
        name: of the parameter, with that of its module before.
        base_layer: the module.
        fan_in_fan_out: of the configuration.
    """
    parameter = base_layer.get_parameter(name.rpartition(".")[2])
    fan_out, fan_in = parameter.shape[-2:]
    if stored_transposed(base_layer, parameter, fan_in_fan_out):
        fan_out, fan_in = fan_in, fan_out
    return Target(name, fan_out, fan_in, 0, parameter.shape[0] if parameter.dim() == 3 else 1)


class SeededExperts(SeededLayer):
    """A module with one parameter adapted: `(experts, out, in)` or `(experts, in, out)`, or a matrix.

    The module is called with the parameter replaced by `W + scaling * M` for the time of the call, whatever it does
    with it: the ways in which transformers computes experts (`experts_implementation`) all read it. So the sum takes
    the memory of the parameter once more while the layer is computed, and until the backward pass where gradients are
    wanted. Activation checkpointing computes it again.

    Where several parameters of a module are adapted, layers are nested, in the order of the parameters.

    Args:
        base_layer: the module, or the layer that adapts another of its parameters.
        parameter_name: of the parameter.
    """

    def __init__(
        self, base_layer: nn.Module, fan_in_fan_out: bool = False, *, parameter_name: str, **kwargs: Any
    ) -> None:
        self.parameter_name = parameter_name
        self._fan_in_fan_out = fan_in_fan_out
        super().__init__(base_layer, fan_in_fan_out, **kwargs)
        self.fan_in_fan_out = stored_transposed(self.get_base_layer(), self._parameter(), fan_in_fan_out)

    def _parameter(self) -> torch.Tensor:
        return getattr(self.get_base_layer(), self.parameter_name)

    def _measure(self) -> None:
        target = self.target(self.parameter_name)
        self.in_features, self.out_features = target.fan_in, target.fan_out
        self.fan_out, self.fan_in, self.experts = target.fan_out, target.fan_in, target.experts

    def target(self, name: str) -> Target:
        place = f"{name.rpartition('.')[0]}.{self.parameter_name}"  # the name that was saved may be another
        return parameter_target(place, self.get_base_layer(), self._fan_in_fan_out)._replace(name=name)

    def adapted_name(self, module_name: str) -> str:
        parts = [part for part in module_name.split(".") if part != "base_layer"]
        return ".".join([*parts, self.parameter_name])

    def adapting(self, parameter_name: str) -> SeededExperts | None:
        """The layer, this one or one inside, that adapts a parameter of the module."""
        layer: nn.Module = self
        while isinstance(layer, SeededExperts):
            if layer.parameter_name == parameter_name:
                return layer
            layer = layer.base_layer
        return None

    def adapted_parameters(self) -> list[str]:
        """Names of the parameters that this layer and those inside adapt."""
        inner = self.base_layer
        return [*(inner.adapted_parameters() if isinstance(inner, SeededExperts) else []), self.parameter_name]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        parameter = self._parameter()
        super()._move_adapter_to_device_of_base_layer(adapter_name, parameter.device if device is None else device)
        held = self.coefficients[adapter_name] if adapter_name in self.coefficients else None
        if held is not None and parameter.is_floating_point() and not held.is_meta:
            self.coefficients[adapter_name] = held.to(parameter.dtype)  # PEFT looks for the dtype of a weight

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.mixed is None:
            return super().forward(x, *args, **kwargs)
        pooled = self.mixed.pool is not None
        if not self.disable_adapters and any(
            name != BASE and (pooled or self.container(name) is not None) for name in self.mixed.names
        ):
            return self._mixed(self.mixed, x, *args, **kwargs)
        return self.base_layer(x, *args, **kwargs)

    def _mixed(self, batch: MixedBatch, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise ValueError(
            f"{type(self).__name__} does not support mixed adapter batches: experts see tokens of all rows together. "
            "Call the model without `adapter_names`, for the rows of one adapter at a time, after `set_adapter`."
        )

    def _adapted(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base = self._parameter()
        if base.is_meta:
            raise RuntimeError(
                f"The parameter {self.parameter_name!r} of a {type(self.get_base_layer()).__name__} is offloaded, and "
                "is not there when its update is added. Load the model without offloading, or merge the adapter first."
            )
        weight = base
        for adapter in adapters:
            weight = weight + self.get_delta_weight(adapter).to(weight.device)
        depth, layer = 0, self.base_layer
        while isinstance(layer, SeededExperts):
            depth, layer = depth + 1, layer.base_layer
        replaced = {"base_layer." * depth + self.parameter_name: weight.to(base.dtype)}
        return torch.func.functional_call(self.base_layer, replaced, (x, *args), kwargs)

    def _delta_weight(self, adapter: str, update: Update) -> torch.Tensor:
        with autocast_off(self._parameter().device):
            return super()._delta_weight(adapter, update)

    def _to_weight(self, delta: torch.Tensor) -> torch.Tensor:
        return (delta.mT if self.fan_in_fan_out else delta).reshape(self._parameter().shape)

    def get_base_weight(self) -> torch.Tensor:
        return cast(torch.Tensor, self._parameter().data)

    def set_base_weight(self, weight_data: torch.Tensor) -> None:
        self._parameter().data = weight_data

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module without this layer and those inside, merged or not; PEFT calls it."""
        layer: nn.Module = self
        while isinstance(layer, SeededExperts):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return layer

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def extra_repr(self) -> str:
        return f"parameter_name={self.parameter_name!r}"
