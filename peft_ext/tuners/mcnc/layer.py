"""Layers adapted with MCNC."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ...generators import Generator
from ..expansion import SharedExpansion
from ..layers import SeededConv2d, SeededEmbedding, SeededLayer, SeededLinear, Update
from .config import McncConfig


class McncLayer(SeededLayer):
    """Chunks `beta * phi(alpha)` that fill the LoRA factors of a layer, or its whole update (paper, section 3).

    The one parameter of an adapter is `mcnc_coefficients`: alpha and beta of every chunk of this layer, one chunk
    after the other. In factors, a layer's A and B are filled as one sequence, A first, and A starts at LoRA's usual
    random initialisation; see `peft_ext.generators.SineManifold` for phi.
    """

    method = "mcnc"
    adapter_layer_names = ("mcnc_coefficients",)
    other_param_names = ("r", "scaling", "mcnc_dropout", "mcnc_expansions")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.r: dict[str, int] = {}  # 0 where an adapter fills the whole weight
        self.mcnc_coefficients = nn.ParameterDict()
        self.mcnc_dropout = nn.ModuleDict()
        self.mcnc_expansions: dict[str, tuple[SharedExpansion]] = {}

    def add_adapter(
        self, adapter_name: str, config: McncConfig, module_name: str, expansions: dict[Generator, SharedExpansion]
    ) -> tuple[SharedExpansion]:
        factors = config.apply_to == "factors"
        r = self.r[adapter_name] = config.r if factors else 0
        self.scaling[adapter_name] = config.alpha / r if factors else 1.0
        options: dict[str, Any]
        if factors:
            options = {
                "offset_stream": ("mcnc", "A", r, self.fan_in, "offset"),
                "offset_size": r * self.fan_in,
                "offset_scale": 1 / math.sqrt(self.fan_in),
            }
        else:
            options = {"scale": 1 / math.sqrt(self.fan_in)}
        generator = config.manifold(config.layer_size(self.fan_out, self.fan_in), **options)
        coefficients = config.start(generator, ("mcnc", "alpha", module_name), 0.0 if config.init_weights else 0.1)
        self.mcnc_coefficients[adapter_name] = nn.Parameter(coefficients.to(torch.get_default_dtype()))

        expansion = SharedExpansion(generator, (generator.size,), adapter_name, slice(0, len(coefficients)))
        if factors:
            # Whole weights are expanded layer by layer: together, they and their gradients would be in memory at once.
            expansion = expansions.setdefault(generator, expansion)
        expansion.add(self.mcnc_coefficients)
        return (expansion,)

    def update(self, adapter: str) -> tuple[Update, None]:
        (expansion,) = self.mcnc_expansions[adapter]
        flat = expansion(self.mcnc_coefficients).to(self._dtype(adapter))
        r = self.r[adapter]
        if not r:
            return flat.view(self.fan_out, self.fan_in), None
        A, B = flat.split((r * self.fan_in, self.fan_out * r))
        return (A.view(r, self.fan_in), B.view(self.fan_out, r)), None


class McncLinear(McncLayer, SeededLinear):
    """An adapted linear layer."""


class McncConv2d(McncLayer, SeededConv2d):
    """An adapted 2-d convolution."""


class McncEmbedding(McncLayer, SeededEmbedding):
    """An adapted embedding."""
