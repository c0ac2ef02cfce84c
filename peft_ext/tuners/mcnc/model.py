"""MCNC on a whole model."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ..layers import fans
from ..model import SeededModel
from .layer import McncConv2d, McncEmbedding, McncLayer, McncLinear


class McncModel(SeededModel):
    """Adapts a model with MCNC; see [`McncConfig`].

    Made by `peft.get_peft_model(model, McncConfig(...))`.
    """

    tuner_layer_cls = McncLayer
    layer_classes: ClassVar = {"linear": McncLinear, "conv2d": McncConv2d, "embedding": McncEmbedding}

    def _check_sizes(self, peft_config: Any, targets: list[nn.Module]) -> None:
        factors = peft_config.apply_to == "factors"
        largest = max(peft_config.layer_size(*fans(target)) for target in targets)
        if peft_config.d is not None and peft_config.d > largest:
            raise ValueError(
                f"`d` must be at most the numbers that a target module needs, {largest} for the largest of the "
                f"{len(targets)} with `apply_to={peft_config.apply_to!r}`"
                + (f" and `r={peft_config.r}`" if factors else "")
                + f", got {peft_config.d}: a longer chunk would be cut off everywhere."
            )
