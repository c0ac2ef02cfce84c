"""Layers adapted with MCNC."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..expansion import SharedExpansion
from ..expert_layers import SeededExperts
from ..layers import SeededLayer, Update
from ..target import Target
from ..weight_layers import SeededConv2d, SeededEmbedding, SeededLinear
from .config import McncConfig


class McncLayer(SeededLayer):
    """Chunks `beta * phi(alpha)` that fill the LoRA factors of a layer, or its whole update (paper, section 3).

    The one parameter of an adapter is `mcnc_coefficients`: alpha and beta of every chunk of this layer, one chunk
    after the other, those of A first. A starts at LoRA's usual random initialisation; see
    `peft_ext.generators.SineManifold` for phi.
    """

    config_class = McncConfig
    more_param_names = ("r",)

    def __init__(self, base_layer: nn.Module, fan_in_fan_out: bool = False, **kwargs: Any) -> None:
        super().__init__(base_layer, fan_in_fan_out, **kwargs)
        self.r: dict[str, int] = {}  # 0 where an adapter fills the whole weight

    def add_adapter(
        self, adapter_name: str, config: McncConfig, target: Target, expansions: dict[Any, SharedExpansion]
    ) -> tuple[SharedExpansion, ...]:
        factors = config.apply_to == "factors"
        r = self.r[adapter_name] = config.r if factors else 0
        self.scaling[adapter_name] = config.alpha / r if factors else 1.0
        generators = config.generators(target)
        container = self.make_container(adapter_name, config.initial(target, generators))
        joined, start = [], 0
        for generator in generators:
            span = slice(start, start + generator.num_coefficients)
            expansion = SharedExpansion(generator, (generator.size,), adapter_name, span)
            if factors:
                # Whole weights are expanded layer by layer: together, they and their gradients would be in memory at
                # once.
                expansion = expansions.setdefault((generator, start), expansion)
            expansion.add(container)
            joined.append(expansion)
            start = span.stop
        return tuple(joined)

    def assemble(self, adapter: str, weights: list[torch.Tensor]) -> tuple[Update, None]:
        weights = [weight.to(self._dtype(adapter)) for weight in weights]
        r = self.r[adapter]
        if not r:
            return weights[0].view(*weights[0].shape[:-1], *self.stack, self.fan_out, self.fan_in), None
        if len(weights) == 1:  # both factors in one sequence
            weights = list(weights[0].split((self.experts * r * self.fan_in, self.experts * self.fan_out * r), dim=-1))
        return self._factors(weights[0], weights[1], r), None


class McncLinear(McncLayer, SeededLinear):
    """An adapted linear layer."""


class McncConv2d(McncLayer, SeededConv2d):
    """An adapted 2-d convolution."""


class McncEmbedding(McncLayer, SeededEmbedding):
    """An adapted embedding."""


class McncExperts(McncLayer, SeededExperts):
    """An adapted parameter: the experts of a mixture, or a matrix."""
