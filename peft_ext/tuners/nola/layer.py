"""Layers adapted with NOLA."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..expansion import SharedExpansion
from ..expert_layers import SeededExperts
from ..layers import SeededLayer, Update
from ..target import Target
from ..weight_layers import SeededConv2d, SeededEmbedding, SeededLinear
from .config import NolaConfig


class NolaLayer(SeededLayer):
    """Factors that are random combinations: `A = A0 + sum_i a_i A_i`, `B = sum_j b_j B_j` (paper, section 2.2).

    The one parameter of an adapter is `nola_coefficients`, the `num_basis` coefficients a followed by those of B; see
    `NolaConfig.generators` for what they combine. The update starts at zero since b does.
    """

    config_class = NolaConfig
    more_param_names = ("r", "alpha")

    def __init__(self, base_layer: nn.Module, fan_in_fan_out: bool = False, **kwargs: object) -> None:
        super().__init__(base_layer, fan_in_fan_out, **kwargs)
        self.r: dict[str, int] = {}
        self.alpha: dict[str, float] = {}

    def add_adapter(
        self, adapter_name: str, config: NolaConfig, target: Target, expansions: dict[Any, SharedExpansion]
    ) -> tuple[SharedExpansion, ...]:
        r, alpha = config.rank(target.name), config.alpha_of(target.name)
        self.r[adapter_name], self.alpha[adapter_name] = r, alpha
        self.scaling[adapter_name] = alpha / r
        basis_A, basis_B = config.generators(target)
        container = self.make_container(adapter_name, config.initial(target, (basis_A, basis_B)))
        num_A, num_B = basis_A.num_coefficients, basis_B.num_coefficients
        own_A = SharedExpansion(basis_A, (*self.stack, r, self.fan_in), adapter_name, slice(0, num_A))
        own_B = SharedExpansion(basis_B, (*self.stack, self.fan_out, r), adapter_name, slice(num_A, num_A + num_B))
        joined = expansions.setdefault(basis_A, own_A), expansions.setdefault(basis_B, own_B)
        for expansion in joined:
            expansion.add(container)
        return joined

    def assemble(self, adapter: str, weights: list[torch.Tensor]) -> tuple[Update, None]:
        A, B = weights
        dtype = self._dtype(adapter)
        return ((A, B) if A.dtype == dtype else (A.to(dtype), B.to(dtype))), None


class NolaLinear(NolaLayer, SeededLinear):
    """An adapted linear layer."""


class NolaConv2d(NolaLayer, SeededConv2d):
    """An adapted 2-d convolution."""


class NolaEmbedding(NolaLayer, SeededEmbedding):
    """An adapted embedding."""


class NolaExperts(NolaLayer, SeededExperts):
    """An adapted parameter: the experts of a mixture, or a matrix."""
