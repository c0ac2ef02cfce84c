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

    An adapter that is loaded inside the block is not scaled, and one that is deleted does not come back.
    `merge_and_unload` inside keeps what was scaled.

    Raises:
        ValueError: the multiplier is no finite number, an adapter is merged, a layer's adapters have no scaling, or
            the model has no adapters. The model is then unchanged. At the end of the block: an adapter was merged in it
            and still is, or another scale was given to one. It is then unmerged, and all have their scales from before.
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
    inside = {
        layer: {adapter: value * multiplier for adapter, value in scaling.items()} for layer, scaling in before.items()
    }
    for layer, scaling in inside.items():
        layer.scaling = dict(scaling)
    merged: set[str] = set()
    changed: set[str] = set()
    try:
        yield
    finally:
        left = set(model.modules())
        for layer in before:
            if layer not in left:  # after `merge_and_unload`
                continue
            if layer.merged:
                merged |= set(layer.merged_adapters)
                layer.unmerge()  # with the scale that it was merged with
            now, given = layer.scaling, inside[layer]
            changed |= {adapter for adapter in now if adapter in given and now[adapter] != given[adapter]}
            layer.scaling = {adapter: before[layer].get(adapter, value) for adapter, value in now.items()}
    if merged or changed:
        what = f"{min(merged)!r} was merged" if merged else f"the scale of {min(changed)!r} was changed"
        raise ValueError(
            f"{what} inside the block, after which scales are what they were before; it was taken back. Do it outside, "
            "with `set_scale` of the layers for another scale, or keep a merged model with `merge_and_unload()`."
        )
