"""Layers adapted with NOLA."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import nn

from ...generators import Generator, RandomBasis
from ..expansion import SharedExpansion
from ..layers import SeededConv2d, SeededEmbedding, SeededLayer, SeededLinear, Update
from .config import NolaConfig


class NolaLayer(SeededLayer):
    """Factors that are random combinations: `A = A0 + sum_i a_i A_i`, `B = sum_j b_j B_j` (paper, section 2.2).

    The one parameter of an adapter is `nola_coefficients`, the `num_basis` coefficients a followed by those of B.
    `A0` is uniform on [-1, 1) / sqrt(fan_in), LoRA's usual initialisation; `A_i` and `B_j` are uniform on
    [-1, 1) / sqrt(num_basis). All are regenerated from the seed. The update starts at zero since b does.
    """

    method = "nola"
    adapter_layer_names = ("nola_coefficients",)
    other_param_names = ("r", "alpha", "scaling", "nola_dropout", "nola_expansions")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.r: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.nola_coefficients = nn.ParameterDict()
        self.nola_dropout = nn.ModuleDict()
        self.nola_expansions: dict[str, tuple[SharedExpansion, SharedExpansion]] = {}

    def add_adapter(
        self, adapter_name: str, config: NolaConfig, module_name: str, expansions: dict[Generator, SharedExpansion]
    ) -> tuple[SharedExpansion, SharedExpansion]:
        r = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), module_name), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), module_name), config.alpha)
        num_A, num_B = config.num_basis_per_factor
        self.r[adapter_name], self.alpha[adapter_name] = r, alpha
        self.scaling[adapter_name] = alpha / r
        coefficients = torch.zeros(num_A + num_B) if config.init_weights else torch.randn(num_A + num_B)
        self.nola_coefficients[adapter_name] = nn.Parameter(coefficients)

        # Layers that share their basis draw it by shape; otherwise by the module's name as well, never by position.
        own: tuple[str, ...] = () if config.share_basis else (module_name,)
        options: dict[str, Any] = {"streamed": not config.share_basis, "version": config.generator_version}
        basis_A = RandomBasis(
            config.seed,
            ("nola", "A", r, self.fan_in, *own),
            num_A,
            r * self.fan_in,
            scale=1 / math.sqrt(num_A),
            offset_scale=1 / math.sqrt(self.fan_in),
            **options,
        )
        basis_B = RandomBasis(
            config.seed,
            ("nola", "B", self.fan_out, r, *own),
            num_B,
            self.fan_out * r,
            scale=1 / math.sqrt(num_B),
            **options,
        )
        own_A = SharedExpansion(basis_A, (r, self.fan_in), adapter_name, slice(0, num_A))
        own_B = SharedExpansion(basis_B, (self.fan_out, r), adapter_name, slice(num_A, num_A + num_B))
        joined = expansions.setdefault(basis_A, own_A), expansions.setdefault(basis_B, own_B)
        for expansion in joined:
            expansion.add(self.nola_coefficients)
        return joined

    def update(self, adapter: str) -> tuple[Update, None]:
        coefficients = self.nola_coefficients
        expand_A, expand_B = self.nola_expansions[adapter]
        A, B = expand_A(coefficients), expand_B(coefficients)
        dtype = coefficients[adapter].dtype
        return ((A, B) if A.dtype == dtype else (A.to(dtype), B.to(dtype))), None


class NolaLinear(NolaLayer, SeededLinear):
    """An adapted linear layer."""


class NolaConv2d(NolaLayer, SeededConv2d):
    """An adapted 2-d convolution."""


class NolaEmbedding(NolaLayer, SeededEmbedding):
    """An adapted embedding."""
