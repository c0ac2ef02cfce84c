"""What holds the coefficients of a layer."""

from __future__ import annotations

from typing import Union

import torch
from torch import nn


class Coefficients(nn.ModuleDict):
    """The coefficients of a layer, a parameter by adapter name; `items` and `values` are the modules that hold them.

    Parameters are named `<adapter>.values`: libraries find those of an adapter by `.<adapter>.` in their names, as
    LoRA's have it (trl does, to copy an adapter to a reference). They are not called `weight`: PEFT's FSDP policy takes
    a module with a weight for a layer that is called.
    """

    def __getitem__(self, adapter: str) -> nn.Parameter:  # type: ignore[override]
        return self._modules[adapter].values  # type: ignore[union-attr, return-value]

    def __setitem__(self, adapter: str, parameter: torch.Tensor) -> None:  # type: ignore[override]
        if not isinstance(parameter, nn.Parameter):  # one that was cast or moved
            parameter = nn.Parameter(parameter.detach(), parameter.requires_grad)
        if adapter not in self:
            self.add_module(adapter, _Holder())
        self._modules[adapter].values = parameter  # type: ignore[union-attr]


Container = Union[Coefficients, nn.ParameterDict]
"""Coefficients by name, of a layer or of a whole network."""


class _Holder(nn.Module):
    values: nn.Parameter

    def extra_repr(self) -> str:
        return " x ".join(str(size) for size in self.values.shape)
