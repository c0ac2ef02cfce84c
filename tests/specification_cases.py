"""Adapters and networks of every kind that the specification of checkpoints speaks of, on tiny models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
import torch
from peft import PeftModel, get_peft_model
from reference_reader import Module, Parameter, base_weight, read_adapter, read_network, update
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_ext import McncConfig, NolaConfig, PrancConfig, SeededNetwork, VisualPromptConfig

DTYPES = ["float32", "bfloat16", "float16", "int8", "int4"]
LAYERS = ["embedding", "first", "second", "wide", "conv1d", "conv2d"]
ALL = [*LAYERS, "norm"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj", "router.weight"]
NETWORK = {"apply_to": "weight", "k": 2, "d": 30, "widths": (8,), "seed": 3}
FACTORS = {"r": 4, "k": 2, "d": 30, "widths": (8,), "seed": 3}
NETWORKS = ["Mixed", "Embedded"]  # models that are whole networks from a seed

# name: (model of tiny_models, configuration class, fields)
CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "nola": ("Layers", NolaConfig, {"r": 2, "num_basis": (5, 7), "alpha": 3.0, "target_modules": LAYERS}),
    "nola-own": (
        "Layers",
        NolaConfig,
        {"r": 2, "num_basis": 6, "share_basis": False, "seed": 2**64 - 1, "target_modules": LAYERS},
    ),
    "nola-scaled": ("Layers", NolaConfig, {"r": 2, "num_basis": 5, "target_modules": LAYERS}),
    "pranc-scaled": ("Layers", PrancConfig, {"num_coefficients": 14, "target_modules": ALL}),
    "mcnc-scaled": ("Layers", McncConfig, {"r": 2, "k": 3, "d": 14, "widths": (5,), "target_modules": LAYERS}),
    "network-pranc-scaled": ("Mixed", PrancConfig, {"num_coefficients": 19, "seed": 4}),
    "nola-plain": (
        "Layers",
        NolaConfig,
        {"r": 2, "num_basis": 5, "parametrization": "plain", "target_modules": LAYERS},
    ),
    "nola-patterns": (
        "Layers",
        NolaConfig,
        {
            "r": 2,
            "num_basis": 4,
            "rank_pattern": {"first": 3, "conv[12]d": 1, **{f"not_there_{i}": 7 for i in range(6)}},
            "alpha_pattern": {"wide": 0.3, "second": 1e-7},
            "target_modules": LAYERS,
        },
    ),
    "nola-llama": ("llama", NolaConfig, {"r": 2, "num_basis": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "nola-tied": (
        "tied",
        NolaConfig,
        {"r": 2, "num_basis": 4, "target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "nola-experts": (
        "experts",
        NolaConfig,
        {"r": 2, "num_basis": (5, 7), "alpha": 3.0, "target_modules": ["o_proj"], "target_parameters": EXPERTS},
    ),
    "nola-experts-own": (
        "experts",
        NolaConfig,
        {"r": 2, "num_basis": 6, "share_basis": False, "target_modules": [], "target_parameters": EXPERTS[:2]},
    ),
    "pranc": ("Layers", PrancConfig, {"num_coefficients": 13, "target_modules": ALL}),
    "pranc-plain": (
        "Layers",
        PrancConfig,
        {"num_coefficients": 13, "parametrization": "plain", "target_modules": ALL},
    ),
    "pranc-two": (
        "Layers",
        PrancConfig,
        {"num_coefficients": 13, "nnz": 2, "adapt_bias": True, "seed": 5, "target_modules": ALL},
    ),
    "pranc-many": ("Layers", PrancConfig, {"num_coefficients": 150, "nnz": 3, "target_modules": ALL}),
    "pranc-experts": (
        "experts",
        PrancConfig,
        {"num_coefficients": 13, "adapt_bias": True, "target_modules": ["o_proj"], "target_parameters": EXPERTS},
    ),
    "pranc-dense": (
        "Layers",
        PrancConfig,
        {"num_coefficients": 13, "basis": "dense", "adapt_bias": True, "target_modules": ALL},
    ),
    "pranc-factors": (
        "Layers",
        PrancConfig,
        {"num_coefficients": 13, "apply_to": "factors", "r": 2, "alpha": 3.0, "target_modules": LAYERS},
    ),
    "pranc-factors-plain": (
        "Layers",
        PrancConfig,
        {
            "num_coefficients": 13,
            "apply_to": "factors",
            "r": 3,
            "nnz": 2,
            "parametrization": "plain",
            "target_modules": LAYERS,
        },
    ),
    "pranc-factors-experts": (
        "experts",
        PrancConfig,
        {
            "num_coefficients": 13,
            "apply_to": "factors",
            "r": 2,
            "target_modules": ["o_proj"],
            "target_parameters": EXPERTS,
        },
    ),
    "mcnc": (
        "Layers",
        McncConfig,
        {"r": 2, "k": 3, "d": 13, "widths": (5,), "alpha": 1.0, "target_modules": LAYERS},
    ),
    "mcnc-plain": (
        "Layers",
        McncConfig,
        {"r": 2, "k": 3, "d": 13, "widths": (5,), "parametrization": "plain", "target_modules": LAYERS},
    ),
    "mcnc-relu": (
        "Layers",
        McncConfig,
        {"r": 3, "k": 4, "d": 31, "widths": (4, 3), "activation": "relu", "normalize": False, "target_modules": LAYERS},
    ),
    "mcnc-default-chunks": ("Layers", McncConfig, {"target_modules": LAYERS}),
    "mcnc-weight": (
        "Layers",
        McncConfig,
        {
            "apply_to": "weight",
            "k": 2,
            "d": 60,
            "widths": (5, 4),
            "activation": "tanh",
            "frequency": 2.5,
            "target_modules": LAYERS,
        },
    ),
    "mcnc-experts": (
        "experts",
        McncConfig,
        {"r": 2, "k": 3, "d": 100, "widths": (5,), "target_modules": [], "target_parameters": EXPERTS[:2]},
    ),
    "mcnc-linear": (
        "gpt2",
        McncConfig,
        {
            "apply_to": "weight",
            "k": 2,
            "d": 500,
            "widths": (),
            "activation": "none",
            "target_modules": ["c_attn", "c_proj"],
        },
    ),
    "prompts": ("vit", VisualPromptConfig, {"num_prompts": 2}),
    "prompts-deep": ("vit", VisualPromptConfig, {"num_prompts": 1, "deep": True}),
    "network-pranc": ("Mixed", PrancConfig, {"num_coefficients": 20, "seed": 3}),
    "network-pranc-two": ("Mixed", PrancConfig, {"num_coefficients": 21, "nnz": 2, "seed": 3}),
    "network-pranc-dense": ("Mixed", PrancConfig, {"num_coefficients": 20, "basis": "dense", "seed": 3}),
    "network-mcnc": ("Mixed", McncConfig, NETWORK),
    "network-mcnc-factors": ("Embedded", McncConfig, FACTORS),
    "network-mcnc-factors-plain": ("Mixed", McncConfig, {**FACTORS, "d": 16, "parametrization": "plain"}),
    "network-nola": ("Embedded", NolaConfig, {"r": 4, "num_basis": (3, 4), "seed": 3}),
    "network-nola-own": (
        "Mixed",
        NolaConfig,
        {"r": 2, "num_basis": 5, "share_basis": False, "parametrization": "plain"},
    ),
    "network-mcnc-relu": ("Mixed", McncConfig, {**NETWORK, "activation": "relu", "normalize": False}),
}


def exact(config: dict[str, Any]) -> bool:
    """Whether the weights of a saved configuration are equal to the bit everywhere."""
    return config["peft_type"] == "VISUAL_PROMPT" or (
        config.get("basis") == "sparse" and config.get("apply_to") != "factors"
    )


def save(case: str, dtype: str, folder: Path, **options: Any) -> None:
    """Saves an adapter or a network with random coefficients."""
    name, config_class, fields = CASES[case]
    config = config_class(**{**fields, "coefficient_dtype": dtype, **options})
    base = getattr(tiny_models, name)()
    model: Any = SeededNetwork(base, config) if name in NETWORKS else get_peft_model(base, config)
    generator = torch.Generator().manual_seed(len(case))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        for buffer in model.buffers():
            if name in NETWORKS:
                buffer.copy_(torch.rand(buffer.shape, generator=generator) * 10)
    model.save_pretrained(str(folder))


# What the library makes of a checkpoint


def loaded_weights(model: nn.Module) -> dict[str, np.ndarray]:
    """What an adapter adds to the base model, or the prompts, or all tensors of a network, by name."""
    found: dict[str, torch.Tensor] = {}
    if not isinstance(model, PeftModel):
        return {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "visual_prompt_tokens"):
            found |= {f"{name}.tokens": tokens for tokens in layer.visual_prompt_tokens.parameters()}
        elif hasattr(layer, "get_delta_weight"):
            found[layer.adapted_name(name).removesuffix(".weight") + ".weight"] = layer.get_delta_weight("default")
            bias = layer.update("default")[1]
            if bias is not None:
                found[f"{name}.bias"] = bias
    return {name: np.ascontiguousarray(tensor.detach().numpy()) for name, tensor in found.items()}


# What the reference reader makes of it


def _kind(layer: nn.Module) -> str:
    if isinstance(layer, (Conv1D, nn.Embedding)):
        return type(layer).__name__
    return "vectors" if isinstance(layer, (nn.LayerNorm, nn.BatchNorm2d)) else "linear"


def _modules(base: Any, fields: dict[str, Any]) -> Iterator[tuple[Module, str, list[int]]]:
    """The modules that an adapter adapts, with the kind and shape of their weights."""
    if "num_prompts" in fields:
        blocks = base.config.num_hidden_layers if fields.get("deep") else 1
        size = [fields["num_prompts"], base.config.hidden_size]
        names = [name for name, module in base.named_modules() if type(module).__name__ == "ViTLayer"]
        for name in names[:blocks]:
            yield Module(name, *size), "tokens", size
        return
    for name, layer in base.named_modules():
        if name.rpartition(".")[2] in fields["target_modules"]:
            kind, shape = _kind(layer), list(layer.weight.shape)
            bias = getattr(layer, "bias", None)
            if kind == "vectors":
                yield Module(name, sum(p.numel() for p in layer.parameters()), 1), kind, [-1]
            else:
                fans = (shape[1], shape[0]) if kind != "linear" else (shape[0], layer.weight[0].numel())
                yield Module(name, *fans, 0 if bias is None else len(bias)), kind, shape
    for name, parameter in base.named_parameters():
        if name.endswith(tuple(fields.get("target_parameters", ()))):
            experts, (fan_out, fan_in) = (*parameter.shape[:-2], 1)[0], parameter.shape[-2:]
            transposed = experts > 1  # so gpt-oss stores its experts
            fans = (fan_in, fan_out) if transposed else (fan_out, fan_in)
            yield Module(name, *fans, 0, experts), "transposed" if transposed else "linear", list(parameter.shape)


def _parameters(network: nn.Module) -> Iterator[Parameter]:
    for name, parameter in network.named_parameters():
        owner, _, attribute = name.rpartition(".")
        kind = _kind(network.get_submodule(owner)) if attribute == "weight" else attribute
        kind = {"vectors": "weight", "token": "other"}.get(kind, kind)
        yield Parameter(name, tuple(parameter.shape), kind)


def rebuilt_weights(case: str, folder: Path) -> dict[str, np.ndarray]:
    """The same as `loaded_weights`, by the reference reader."""
    name, _, fields = CASES[case]
    base = getattr(tiny_models, name)()
    if name in NETWORKS:
        described = json.loads((folder / "seed_config.json").read_text())
        return read_network(described, (folder / "model.safetensors").read_bytes(), list(_parameters(base)))
    config = json.loads((folder / "adapter_config.json").read_text())
    modules = list(_modules(base, fields))
    data = (folder / "adapter_model.safetensors").read_bytes()
    coefficients, _ = read_adapter(config, data, [module for module, _, _ in modules])
    adapted = [module for module, _, _ in modules]
    found = {}
    for module, kind, shape in modules:
        own = coefficients[module.name]
        if kind == "tokens":
            found[f"{module.name}.tokens"] = own.reshape(shape)
            continue
        matrix, bias = update(config, module, own, adapted)
        found[module.name.removesuffix(".weight") + ".weight"] = base_weight(matrix, kind, shape)
        if len(bias):
            found[f"{module.name}.bias"] = bias
    if config.get("ensure_weight_tying"):
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    return found
