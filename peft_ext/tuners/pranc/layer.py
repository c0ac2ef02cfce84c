"""Layers adapted with PRANC."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Optional, cast

import torch
from torch import nn

from ...generators import SparseBasis
from ..coefficients import Coefficients
from ..expansion import PartialExpansion, SharedExpansion
from ..expert_layers import SeededExperts
from ..layers import SeededLayer, Update
from ..mixed import MixedBatch
from ..reading import read
from ..target import Target
from ..weight_layers import SeededConv2d, SeededEmbedding, SeededLinear
from .config import PrancConfig


class PrancLayer(SeededLayer):
    """Weights plus random combinations of the adapter's one vector: `W + basis @ coefficients / sqrt(fan_in)`.

    Or, with `apply_to="factors"`, plus `B @ A`, both filled from that vector.

    (Paper, equation 1, of the update instead of the whole network; the factor is the scale of a fresh initialisation,
    which the published basis has.) The basis is named after the module: no other target changes it.

    The vector is a parameter of the layer that is adapted first. The others refer to what holds it, so a state dict
    names it once, and all see it replaced when the adapter is cast, moved or loaded.
    """

    config_class = PrancConfig
    more_layer_names = ("_pranc_vectors",)
    more_param_names = ("pranc_containers", "r")

    def __init__(self, base_layer: nn.Module, fan_in_fan_out: bool = False, **kwargs: Any) -> None:
        super().__init__(base_layer, fan_in_fan_out, **kwargs)
        self.pranc_containers: dict[str, Coefficients] = {}
        self.r: dict[str, int] = {}  # 0 where an adapter fills the whole weight

    def container(self, adapter: str) -> Coefficients | None:
        return super().container(adapter) if adapter in self.tied_to else self.pranc_containers.get(adapter)

    @property
    def _pranc_vectors(self) -> nn.ModuleDict:
        """What holds the vectors that this layer reads, by adapter name, its own and those of other layers.

        PEFT asks here whether they are trained and where they are. They are not this layer's submodules by it.
        """
        held = {name: each._modules[name] for name, each in self.pranc_containers.items() if name in each}
        return nn.ModuleDict(cast(dict[str, nn.Module], held))

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name in self.coefficients:  # otherwise the vector goes where the layer is that owns it
            super()._move_adapter_to_device_of_base_layer(adapter_name, device)

    def _get_available_adapters(self) -> set[str]:
        return (
            self.pranc_containers.keys() | self.tied_to.keys()
        )  # PEFT looks for parameters, which this layer may not own

    def add_adapter(
        self, adapter_name: str, config: PrancConfig, target: Target, expansions: dict[Any, SharedExpansion]
    ) -> tuple[SharedExpansion, ...]:
        r = self.r[adapter_name] = config.r if config.on_factors else 0
        self.scaling[adapter_name] = config.alpha / r if r else 1.0
        generators = config.generators(target)
        if expansions:
            container = cast(Coefficients, next(iter(expansions.values())).containers[0])
        else:
            container = self.make_container(adapter_name, config.initial(target, generators[:1]))
        self.pranc_containers[adapter_name] = container
        made: list[SharedExpansion] = []
        for generator in generators:
            key: Any
            if config.on_factors:
                part = cast(SparseBasis, generator)
                key = part.whole
                first = cast(Optional[PartialExpansion], expansions.get(key))
                expansion: SharedExpansion = PartialExpansion(part, adapter_name, first)
            else:
                # Joining the layers would save nothing, and keep the updates and gradients of all in memory at once.
                key, span = generator, slice(0, generator.num_coefficients)
                expansion = SharedExpansion(generator, (generator.size,), adapter_name, span, one_vector=True)
            expansion.add(container)
            expansions.setdefault(key, expansion)
            made.append(expansion)
        return tuple(made)

    def adapts(self, adapter: str, parameter: str) -> bool:
        return parameter == "weight" or self._with_bias(adapter)

    def _with_bias(self, adapter: str) -> bool:
        return not self.r[adapter] and self.expansions[adapter][0].generator.size > self._size

    @property
    def _size(self) -> int:
        """Numbers in the weight."""
        return self.experts * self.fan_out * self.fan_in

    def assemble(self, adapter: str, weights: list[torch.Tensor]) -> tuple[Update, torch.Tensor | None]:
        flat, *others = (weight.to(self._dtype(adapter)) for weight in weights)
        if others:
            return self._factors(flat, others[0], self.r[adapter]), None
        size = self._size
        bias = flat[..., size:] if flat.shape[-1] > size else None
        return flat[..., :size].reshape(*flat.shape[:-1], *self.stack, self.fan_out, self.fan_in), bias

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        # The conversion leaves updates of biases out.
        return super().supports_lora_conversion(adapter_name) and not self._with_bias(adapter_name)


class PrancLinear(PrancLayer, SeededLinear):
    """An adapted linear layer."""


class PrancConv2d(PrancLayer, SeededConv2d):
    """An adapted 2-d convolution."""


class PrancEmbedding(PrancLayer, SeededEmbedding):
    """An adapted embedding."""


class PrancExperts(PrancLayer, SeededExperts):
    """An adapted parameter: the experts of a mixture, or a matrix."""


class PrancVector(PrancLayer):
    """A module whose parameters are all vectors, such as a norm: its weight, bias and whatever else it has."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "base_layer":
                raise
        found = getattr(self.base_layer, name)  # nn.TransformerEncoderLayer asks its norms for `eps`
        return read(self, name, found) if isinstance(found, nn.Parameter) else found

    def _adapted(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        updated: dict[str, torch.Tensor] = dict(self.base_layer.named_parameters())
        for adapter in adapters:
            for name, update in self._parts(adapter):
                updated[name] = (updated[name] + update.to(updated[name].device)).to(updated[name].dtype)
        return torch.func.functional_call(self.base_layer, updated, (x, *args), kwargs)

    def _mixed(self, batch: MixedBatch, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        parameters = dict(self.base_layer.named_parameters())
        flat = torch.cat([parameter.flatten() for parameter in parameters.values()])
        by_row = flat.expand(len(x), -1)
        for part in batch.parts(self):
            rows = torch.arange(len(x), device=flat.device) if part.rows is None else part.rows
            update = part.weights[0] * self._scaling_of(part)
            by_row = by_row.index_add(0, rows.to(flat.device), update.to(flat))

        def row(flat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            values = flat.split([parameter.numel() for parameter in parameters.values()])
            shaped = {name: value.view_as(parameters[name]) for name, value in zip(parameters, values)}
            return torch.func.functional_call(self.base_layer, shaped, (x[None], *args), kwargs)[0]

        return torch.vmap(row)(by_row, x)

    def parameter_updates(self, adapter: str) -> dict[str, torch.Tensor]:
        return dict(self._parts(adapter))

    def adapts(self, adapter: str, parameter: str) -> bool:
        return True

    def _parts(self, adapter: str) -> Iterator[tuple[str, torch.Tensor]]:
        """The update cut into those of the module's parameters."""
        parameters = dict(self.get_base_layer().named_parameters())
        flat = self._scaled(adapter, cast(torch.Tensor, self.update(adapter)[0]).flatten())
        parts = flat.split([parameter.numel() for parameter in parameters.values()])
        return zip(parameters, parts)

    def _add_to_base(self, adapter: str, sign: int, safe: bool) -> None:
        merged = {}
        for name, update in self._parts(adapter):
            parameter = self.get_base_layer().get_parameter(name)
            merged[name] = (parameter + sign * update.to(parameter.device)).to(parameter.dtype)
            self._check_merged(merged[name], safe, adapter)
        for name, value in merged.items():
            self.get_base_layer().get_parameter(name).data = value

    def _to_weight(self, delta: torch.Tensor) -> torch.Tensor:
        return delta.flatten()  # the updates of all parameters of the module, one after the other
