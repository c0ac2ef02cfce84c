"""Base layers of quantization libraries."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils import resolve_quantization_backend
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn


class QuantoBackend(QuantizationBackend):
    """Layers of optimum-quanto, which PEFT takes for layers of `nn.Linear`: what it sets as their weight is lost."""

    supports_merge = True
    backend_name = "quanto"
    layer_type = "linear"

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        weight: Any = base_layer.weight
        return (
            weight.dequantize() if hasattr(weight, "dequantize") and type(weight) is not nn.Parameter else weight.data
        )

    def set_base_weight(self, peft_layer: Any, weight_data: torch.Tensor) -> None:
        base_layer = peft_layer.get_base_layer()
        frozen = base_layer.frozen
        base_layer.weight = nn.Parameter(weight_data, requires_grad=False)
        if frozen:
            base_layer.freeze()  # quantizes


def backend_of(base_layer: nn.Module, **kwargs: Any) -> QuantizationBackend | None:
    """What reads and changes the weight of a quantized layer; `None` for other layers.

    Args:
        kwargs: what PEFT's backends need to know of the model.
    """
    if any(each.__module__.startswith("optimum.quanto.") for each in type(base_layer).__mro__):
        return QuantoBackend()
    return resolve_quantization_backend(base_layer, **kwargs)
