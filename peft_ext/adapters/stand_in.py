"""Finished adapters on stand-ins of their base models: modules of the right kinds and shapes without memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import inject_adapter_in_model
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from ..checkpoint.identity import Identity, check_identity
from ..tuners.layers import SeededLayer, layer_kind, target_of
from ..tuners.target import Target, together
from .inspection import head_options, model_class
from .saved import Saved

ADAPTER = "default"
"""The name of the adapter on the stand-in."""

_LINEAR = set(
    "q_proj k_proj v_proj o_proj out_proj qkv_proj gate_proj up_proj down_proj gate_up_proj query key value query_proj "
    "key_proj value_proj query_key_value c_attn c_proj c_fc q_lin k_lin v_lin out_lin lin1 lin2 fc1 fc2 fc_in fc_out "
    "dense_h_to_4h dense_4h_to_h lm_head".split()
)


def on_stand_in(saved: Saved, base: nn.Module | str | None) -> tuple[nn.Module, list[str] | None]:
    """A model of the adapted modules alone, with the adapter `"default"` of a checkpoint that was verified.

    Args:
        saved: an adapter of a method whose layers regenerate their weights.
        base: the base model, of which kinds and shapes are read, or its folder or id on the hub, of which the
            configuration is read. Without it the names must tell that the modules are linear layers, and the
            checkpoint their shapes.

    Returns:
        The model, and the names of all modules of the base model if it was given.

    Raises:
        ValueError: a base model is needed, or does not fit.
        OSError: there is no such base model.
    """
    names, everything = [target.name for target in saved.targets], None
    parameters = getattr(saved.config, "target_parameters", None)
    if parameters:
        raise ValueError(
            f"`target_parameters` {parameters!r} of the adapter are experts or other parameters, which cannot be "
            "exported as LoRA. Merge the adapter into its base model instead (`merge_and_unload`)."
        )
    if base is None:
        _check_names(saved)
        modules = {target.name: _linear(target) for target in saved.targets}
    else:
        found = dict((base if isinstance(base, nn.Module) else _empty_model(saved, base)).named_modules())
        everything = list(found)
        missing = [name for name in names if name not in found]
        if missing:
            raise ValueError(f"`base` must be the model that was adapted, got one without {missing[0]!r}.")
        modules = {name: _stand_in(name, found[name]) for name in names}

    targets = together([target_of(name, module) for name, module in modules.items()])
    described = [saved.config.described(target) for target in targets]
    check_identity(saved.identity, Identity(saved.config.generating(), described), "of the saved adapter")
    saved = copy.copy(saved)
    saved.targets, saved.shapes_known = targets, True
    vectors = saved.coefficients()
    model = _tree(modules).to(vectors[0].dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, on models that are none of transformers
        inject_adapter_in_model(_bare_config(saved, names), model, ADAPTER)
    layer = next(module for module in model.modules() if isinstance(module, SeededLayer))
    with torch.no_grad():
        for parameter, vector in zip(layer.provenances[ADAPTER].parameters(), vectors, strict=True):
            parameter.copy_(vector.view(parameter.shape))
    return model, everything


def _check_names(saved: Saved) -> None:
    unknown = [target.name for target in saved.targets if target.name.rpartition(".")[2] not in _LINEAR]
    if unknown:
        raise ValueError(
            f"`base` must be given: whether {unknown[0]!r} is a linear layer, an embedding or a convolution is not in "
            "the checkpoint. Give the base model, or its folder or id on the hub, of which the configuration is read."
        )
    if not saved.shapes_known:
        raise ValueError(
            "`base` must be given: which of the adapted modules has which shape is not in the checkpoint. Give the "
            "base model, or its folder or id on the hub, of which the configuration is read."
        )


def _empty_model(saved: Saved, base: str) -> nn.Module:
    options = {"num_labels": number} if (number := head_options(saved).get("num_labels")) else {}
    config = AutoConfig.from_pretrained(base, **options)
    kind = model_class(saved)
    with torch.device("meta"):
        return kind.from_config(config) if hasattr(kind, "from_config") else kind(config)


def _stand_in(name: str, module: nn.Module) -> nn.Module:
    kind = layer_kind(module)
    if kind == "vector":
        raise ValueError(vector_refused(name))
    stand_in: nn.Module
    with torch.device("meta"):
        if isinstance(module, nn.Conv2d):
            sizes: Any = (module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding)
            more: Any = (module.dilation, module.groups, module.bias is not None, module.padding_mode)
            stand_in = nn.Conv2d(*sizes, *more)
        elif isinstance(module, nn.Embedding):
            stand_in = nn.Embedding(
                module.num_embeddings, module.embedding_dim, module.padding_idx, max_norm=module.max_norm
            )
        elif isinstance(module, Conv1D):
            stand_in = Conv1D(module.nf, module.nx)
        elif kind == "linear":
            return _linear(target_of(name, module))
        else:
            raise ValueError(
                f"`base` must have a module that can be adapted at {name!r}, got a {type(module).__name__}."
            )
    return _without_memory(stand_in)


def _linear(target: Target) -> nn.Module:
    return _without_memory(nn.Linear(target.fan_in, target.fan_out, bool(target.biases), device="meta"))


def _without_memory(module: nn.Module) -> nn.Module:
    """A module made on the meta device, with parameters on the CPU that repeat one number.

    PEFT would put the coefficients of the adapter on the meta device too.
    """
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(torch.zeros(1, device="cpu").expand(parameter.shape), requires_grad=False))
    return module


def _tree(modules: Mapping[str, nn.Module]) -> nn.Module:
    """A model with modules at some names."""
    root = nn.Module()
    for name, module in modules.items():
        *path, end = name.split(".")
        place = root
        for part in path:
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.add_module(end, module)
    return root


def _bare_config(saved: Saved, names: list[str]) -> Any:
    """The configuration of a new adapter of the same modules, with nothing beside the coefficients."""
    config = copy.copy(saved.config)
    config.identity = config.target_shapes = config.target_names = config.base_fingerprint = None
    config.target_modules = set(names)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = config.modules_to_save = None
    config.bias = "none"
    return config


def vector_refused(name: str) -> str:
    """Why a module that holds vectors only cannot be exported."""
    return (
        f"{name!r} holds vectors only (a norm), which a LoRA adapter cannot update. Merge the adapter into the model "
        "(`merge_and_unload`) and save that, or adapt without it."
    )
