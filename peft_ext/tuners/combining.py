"""Adapters that are made from others of the same generators, by weighted sums of their coefficients."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper

from ..checks import check_number
from .checkpointed import provenance_of
from .config import ELSEWHERE
from .provenance import Provenance

OF_LORA = (
    "svd",
    "cat",
    "ties",
    "ties_svd",
    "dare_ties",
    "dare_linear",
    "dare_ties_svd",
    "dare_linear_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
)
"""What else PEFT's `LoraModel.add_weighted_adapter` has."""


def add_weighted_adapter(
    tuner: Any,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str,
    options: dict[str, Any],
) -> None:
    """Adds an adapter whose coefficients are combined from those of others; see `SeededModel.add_weighted_adapter`."""
    _check_arguments(tuner, adapters, weights, adapter_name, combination_type, options)
    sources = [_verified(tuner, adapter) for adapter in adapters]
    for source in sources[1:]:
        check_alike(sources[0], source, (sources[0].adapter_name, source.adapter_name))
    _check_modules(tuner, adapters)
    config = copy.copy(tuner.peft_config[adapters[0]])
    combined = []
    for index in range(len(sources[0].containers)):
        factors = [weight * _scale(source, index) for weight, source in zip(weights, sources)]
        vectors = [source.parameters()[index].detach() for source in sources]
        combined.append(config.combined(vectors, factors))

    tuner.peft_config[adapter_name] = config
    try:
        tuner.inject_adapter(tuner.model, adapter_name)
    except Exception:
        tuner.peft_config.pop(adapter_name, None)
        raise
    made = provenance_of(tuner, adapter_name)
    assert made is not None
    with torch.no_grad():
        for parameter, vector in zip(made.parameters(), combined):
            parameter.copy_(vector)
    made.verified()


def _check_arguments(
    tuner: Any,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str,
    options: dict[str, Any],
) -> None:
    if adapter_name in tuner.peft_config:
        raise ValueError(f"`adapter_name` must be a new name, got {adapter_name!r}, which is an adapter of the model.")
    if not adapters:
        raise ValueError(f"Found no adapter matching the names in {adapters}")  # PEFT's words, as those below
    for adapter in adapters:
        if adapter not in tuner.peft_config:
            raise ValueError(f"Adapter {adapter} does not exist")
        if tuner.pool is not None and adapter in tuner.pool:
            raise ValueError(
                f"`adapters` must not be in the model's pool, got {adapter!r}: load it with `load_adapter`."
            )
    if len(weights) != len(adapters):
        raise ValueError(f"`weights` must have a number for each of the {len(adapters)} adapters, got {weights!r}.")
    for index, weight in enumerate(weights):
        check_number(f"weights[{index}]", weight)
    if combination_type not in ("linear", *OF_LORA):
        raise ValueError(f"Invalid combination_type: {combination_type}")
    if combination_type != "linear" and len(adapters) > 1:  # of one adapter all types are the same
        method = tuner.peft_config[adapters[0]].method_name
        raise ValueError(
            f"`combination_type` must be 'linear' for {method}, got {combination_type!r}: coefficients of the same "
            f"number cannot make what it gives. {ELSEWHERE}"
        )
    if options:
        raise ValueError(f"`{next(iter(options))}` has no effect on combination_type='linear': leave it out.")


def _verified(tuner: Any, adapter: str) -> Provenance:
    provenance = provenance_of(tuner, adapter)
    if provenance is None:
        raise ValueError(f"Adapter {adapter!r} adapts no layer that could be combined.")
    provenance.settle()
    config = tuner.peft_config[adapter]
    name = provenance.changed_field(config)
    if name is not None:
        raise ValueError(
            f"`{name}` of the configuration of adapter {adapter!r} was changed after it was made: it has "
            f"{provenance.fields.get(name)!r}, the configuration says {config.generating().get(name)!r}. Change it "
            "back."
        )
    return provenance


def check_alike(first: Provenance, other: Provenance, names: tuple[str, str]) -> None:
    """Raises a ValueError if the coefficients of two adapters, which the message gives names, do not mean the same."""
    mine, theirs = first.fields, other.fields
    name = next((name for name in (*mine, *theirs) if mine.get(name) != theirs.get(name)), None)
    if name is not None:
        raise ValueError(
            f"`adapters` must be alike in all that makes weights from coefficients: `{name}` is {mine.get(name)!r} in "
            f"{names[0]!r} and {theirs.get(name)!r} in {names[1]!r}. {ELSEWHERE}"
        )
    if first.identity != other.identity:
        raise ValueError(
            f"`adapters` must adapt the same modules, which {names[0]!r} and {names[1]!r} do not. {ELSEWHERE}"
        )


def _check_modules(tuner: Any, adapters: list[str]) -> None:
    for name, module in tuner.model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            trained = module._get_available_adapters() & set(adapters)
            if trained:
                raise ValueError(
                    f"`adapters` must have no modules that are trained whole, whose weights no coefficients give: "
                    f"{sorted(trained)[0]!r} has {name!r} (`modules_to_save`)."
                )


def _scale(source: Provenance, index: int) -> float:
    """What the updates of a vector of coefficients are multiplied by now, relative to what its configuration says."""
    adapter, container = source.adapter_name, source.containers[index]
    scales = {layer.scale_of(adapter) for layer in source.layers if layer.container(adapter) is container}
    if len(scales) > 1:
        raise ValueError(
            f"Adapter {adapter!r} must have one scale in all layers that read one vector of coefficients, got "
            f"{', '.join(f'{scale:g}' for scale in sorted(scales))}. Give each layer the same with `set_scale`, or put "
            "them back with `unscale_layer()`."
        )
    return scales.pop()
