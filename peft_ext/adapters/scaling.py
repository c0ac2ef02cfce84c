"""Scales the adapters of a model for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..checks import check_number


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiplies the updates of all adapters of a model inside a `with` block.

    What `peft.helpers.rescale_adapter_scale` does for LoRA, whose layers it looks for; this one scales the adapters of
    every method whose layers have a `scaling`: those of this package (but for prompts), LoRA, LoHa, LoKr. With a
    multiplier from 0 to 1 that is WiSE-FT (https://huggingface.co/papers/2109.01903) where updates are linear.

    Raises:
        ValueError: the multiplier is no finite number, an adapter is merged, a layer's adapters have no scaling, or
            the model has no adapters. The model is then unchanged.
    """
    check_number("multiplier", multiplier)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        raise ValueError(f"`model` must have adapters, got {type(model).__name__} without any.")
    before: dict[Any, dict[str, float]] = {}
    for layer in layers:
        scaling = getattr(layer, "scaling", None)
        if not isinstance(scaling, dict):
            raise ValueError(f"The adapters of a {type(layer).__name__} have no scaling that could be multiplied.")
        if layer.merged:
            raise ValueError(
                f"`model` must not be merged: the scale of {layer.merged_adapters[0]!r} has no effect while its update "
                "is in the base weights. Call `unmerge_adapter()` first."
            )
        before[layer] = scaling
    try:
        for layer, scaling in before.items():
            layer.scaling = {adapter: value * multiplier for adapter, value in scaling.items()}
        yield
    finally:
        for layer, scaling in before.items():
            layer.scaling = scaling
