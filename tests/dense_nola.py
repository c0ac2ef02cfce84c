"""NOLA as published, with dense matrices and nothing of the package but its random numbers, to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_ext import NolaConfig
from peft_ext.randomness import uniform

PREFIX = "base_model.model."
MARK = ".nola_coefficients."


def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a layer; for an embedding the inputs are the tokens."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    if isinstance(layer, (nn.Embedding, Conv1D)):
        return weight.shape[1], weight.shape[0]
    return weight.shape[0], weight[0].numel()


def factors(
    config: NolaConfig, shape: tuple[int, int], coefficients: torch.Tensor, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`A = A0 + sum_i a_i A_i` and `B = sum_j b_j B_j`, matrix by matrix."""
    out_features, in_features = shape
    r = config.rank_pattern.get(name.rpartition(".")[-1], config.r)
    num_A, num_B = config.num_basis if isinstance(config.num_basis, tuple) else (config.num_basis,) * 2
    own = () if config.share_basis else (name,)
    stream_A: tuple[Any, ...] = ("nola", "A", r, in_features, *own)
    stream_B: tuple[Any, ...] = ("nola", "B", out_features, r, *own)
    dtype = torch.promote_types(coefficients.dtype, torch.float32)
    a, b = coefficients.to(dtype).split([num_A, num_B])

    A = uniform(config.seed, (*stream_A, "offset"), r * in_features).to(dtype) / math.sqrt(in_features)
    for i in range(num_A):
        drawn = uniform(config.seed, (*stream_A, "basis"), r * in_features, i * r * in_features).to(dtype)
        A = A + a[i] * drawn / math.sqrt(num_A)
    B = torch.zeros(out_features * r, dtype=dtype)
    for j in range(num_B):
        drawn = uniform(config.seed, (*stream_B, "basis"), out_features * r, j * out_features * r).to(dtype)
        B = B + b[j] * drawn / math.sqrt(num_B)
    return A.view(r, in_features), B.view(out_features, r)


def update(config: NolaConfig, layer: nn.Module, coefficients: torch.Tensor, name: str) -> torch.Tensor:
    """The update of a layer's weight, in the shape of the weight."""
    A, B = factors(config, matrix_shape(layer), coefficients, name)
    last = name.rpartition(".")[-1]
    delta = config.alpha_pattern.get(last, config.alpha) / config.rank_pattern.get(last, config.r) * (B @ A)
    assert isinstance(layer.weight, torch.Tensor)
    return (delta.T if isinstance(layer, (nn.Embedding, Conv1D)) else delta).reshape(layer.weight.shape)


def coefficients_of(model: nn.Module, adapter: str = "default") -> dict[str, torch.Tensor]:
    """The coefficients of an adapter in a PEFT model, by the name of the adapted layer in the base model."""
    return {
        name.removeprefix(PREFIX).removesuffix(MARK + adapter): parameter
        for name, parameter in model.named_parameters()
        if name.endswith(MARK + adapter)
    }


def run_dense(
    base: nn.Module, config: NolaConfig, coefficients: dict[str, torch.Tensor], call: Callable[..., Any]
) -> Any:
    """`call(base)` with every adapted weight of `base` replaced by `W + update`, differentiable in the coefficients."""
    weights = {
        f"{name}.weight": base.get_submodule(name).weight + update(config, base.get_submodule(name), value, name)
        for name, value in coefficients.items()
    }

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = base

        def forward(self) -> Any:
            return call(self.model)

    return torch.func.functional_call(Called(), {f"model.{name}": weight for name, weight in weights.items()}, ())


def dense_gradients(
    base: nn.Module, config: NolaConfig, model: nn.Module, loss: Callable[..., torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Gradients of `loss(model)` with respect to the coefficients of a PEFT model, by the dense computation."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in coefficients_of(model).items()}
    value = run_dense(base, config, leaves, loss)
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found)
    }
