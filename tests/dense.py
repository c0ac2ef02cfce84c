"""The methods as published, with dense matrices and nothing of the package but its random numbers, to compare with."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_ext import McncConfig, NolaConfig, PrancConfig
from peft_ext.randomness import uniform

PREFIX = "base_model.model."
FUNCTIONS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], float]] = {  # activations and their usual gains
    "sine": (torch.sin, math.sqrt(2)),
    "relu": (torch.relu, math.sqrt(2)),
    "tanh": (torch.tanh, 5 / 3),
    "none": (lambda x: x, 1.0),
}


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to `tolerance` of each entry and of the largest one."""
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.detach().abs().max()))


# Generators


@functools.lru_cache(maxsize=256)
def sparse_matrix(seed: int, stream: tuple[str | int, ...], k: int, size: int, nnz: int) -> torch.Tensor:
    """A sparse basis of scale 1, `(k, size)` in float64, entry by entry."""
    total = torch.zeros(k, size, dtype=torch.float64)
    for t in range(nnz):
        matrix = torch.zeros(k, size, dtype=torch.float64)
        for run in range(math.ceil(size / k)):
            keys = uniform(seed, (*stream, "order", t), k, run * k).tolist()
            signs = uniform(seed, (*stream, "sign", t), k, run * k).tolist()
            order = sorted(range(k), key=keys.__getitem__)  # stable
            for place in range(min(k, size - run * k)):
                matrix[order[place], run * k + place] = -1 if signs[place] < 0 else 1
        if size >= k:
            matrix *= math.sqrt(size / k) / matrix.norm(dim=1, keepdim=True)
        total += matrix
    return total / math.sqrt(nnz)


def pranc_basis(config: PrancConfig, stream: tuple[str | int, ...], size: int) -> torch.Tensor:
    """The basis of `size` numbers, whose variance is 1 where that of the coefficients is 1."""
    if config.basis == "dense":
        k = config.num_coefficients
        return dense_matrix(config.seed, stream, k, size) * math.sqrt(3 / k)  # variance 1 / k
    return sparse_matrix(config.seed, stream, config.num_coefficients, size, config.nnz)


@functools.lru_cache(maxsize=64)
def dense_matrix(seed: int, stream: tuple[str | int, ...], k: int, size: int) -> torch.Tensor:
    """A dense basis of scale 1, `(k, size)` in float64, one vector at a time."""
    rows = [uniform(seed, (*stream, "basis"), size, i * size) for i in range(k)]
    return torch.stack(rows).double()


def on_manifold(
    coefficients: torch.Tensor,
    seed: int,
    stream: tuple[str | int, ...],
    size: int,
    k: int,
    d: int,
    widths: tuple[int, ...],
    activation: str,
    frequency: float,
    normalize: bool,
) -> torch.Tensor:
    """`beta * phi(alpha)`, one chunk after the other."""
    sizes = [k, *widths, d]
    function, gain = FUNCTIONS[activation]
    layers = []
    for i, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:])):
        drawn = uniform(seed, (*stream, "layer", i), fan_in * fan_out).view(fan_in, fan_out)
        variance = (1.0 if i == 0 else gain**2) / fan_in  # uniform numbers on [-1, 1) have 1/3
        layers.append(drawn.to(coefficients.dtype) * math.sqrt(3 * variance))
    chunks = []
    for start in range(0, math.ceil(size / d) * (k + 1), k + 1):
        alpha = coefficients[..., start : start + k]
        x = frequency * alpha @ layers[0]
        for layer in layers[1:]:
            x = function(x) @ layer
        if normalize:
            x = x / x.square().mean(-1, keepdim=True).sqrt()
        chunks.append(coefficients[..., start + k : start + k + 1] * x)
    return torch.cat(chunks, -1)[..., :size]


# Layers


Shapes = list[tuple[int, int]]
"""Rows and columns of all adapted layers."""


@dataclass
class Update:
    """What an adapter adds to a layer: `(out, in)` to the weight, perhaps `scaling * B @ A`, and to the bias."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    factors: tuple[torch.Tensor, torch.Tensor] | None = None
    scaling: float = 1.0


def vectors(layer: nn.Module) -> bool:
    return all(parameter.dim() == 1 for parameter in layer.parameters())


def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a layer; for an embedding the inputs are the tokens, for a norm there is one."""
    if vectors(layer):
        return sum(parameter.numel() for parameter in layer.parameters()), 1
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    if isinstance(layer, (nn.Embedding, Conv1D)):
        return weight.shape[1], weight.shape[0]
    return weight.shape[0], weight[0].numel()


def nola(
    config: NolaConfig, layer: nn.Module, name: str, coefficients: torch.Tensor, shapes: Shapes, before: int
) -> Update:
    """`A = A0 + sum_i a_i A_i` and `B = sum_j b_j B_j`."""
    out_features, in_features = matrix_shape(layer)
    last = name.rpartition(".")[-1]
    r = config.rank_pattern.get(last, config.r)
    num_A, num_B = config.num_basis if isinstance(config.num_basis, tuple) else (config.num_basis,) * 2
    own = () if config.share_basis else (name,)
    stream_A: tuple[Any, ...] = ("nola", "A", r, in_features, *own)
    stream_B: tuple[Any, ...] = ("nola", "B", out_features, r, *own)
    a, b = coefficients.split([num_A, num_B])
    if config.parametrization == "scaled":
        a = a * math.sqrt(3) * (in_features * r / num_A) ** 0.25
        b = b * math.sqrt(3 * out_features * r / num_B)
    A = uniform(config.seed, (*stream_A, "offset"), r * in_features).to(a.dtype) / math.sqrt(in_features)
    A = A + a / math.sqrt(num_A) @ dense_matrix(config.seed, stream_A, num_A, r * in_features).to(a.dtype)
    B = b / math.sqrt(num_B) @ dense_matrix(config.seed, stream_B, num_B, out_features * r).to(b.dtype)
    A, B, scaling = A.view(r, in_features), B.view(out_features, r), config.alpha_pattern.get(last, config.alpha) / r
    return Update(scaling * B @ A, factors=(A, B), scaling=scaling)


def pranc(
    config: PrancConfig, layer: nn.Module, name: str, coefficients: torch.Tensor, shapes: Shapes, before: int
) -> Update:
    """`basis @ coefficients / sqrt(fan_in)`; or A, beside its random start, and B, both filled from the one vector."""
    shape, k = matrix_shape(layer), config.num_coefficients
    if config.apply_to == "factors":
        return pranc_factors(config, coefficients, shape, shapes, before)
    adapted = sum(rows * columns for rows, columns in shapes)
    weights, bias = shape[0] * shape[1], getattr(layer, "bias", None)
    biased = config.adapt_bias and bias is not None and not vectors(layer)
    size = weights + (shape[0] if biased else 0)
    stream = ("pranc", config.basis, name, *shape)
    basis = pranc_basis(config, stream, size)
    if config.parametrization == "scaled":
        coefficients = coefficients * math.sqrt(adapted / k)
    flat = coefficients @ (basis / math.sqrt(shape[1])).to(coefficients.dtype)
    return Update(flat[:weights].view(shape), flat[weights:] if biased else None)


def pranc_factors(
    config: PrancConfig, coefficients: torch.Tensor, shape: tuple[int, int], shapes: Shapes, before: int
) -> Update:
    r, k, (rows, columns) = config.r, config.num_coefficients, shape
    all_rows, all_columns = ([r * each[side] for each in shapes] for side in (0, 1))
    factor_A = factor_B = 1.0
    if config.parametrization == "scaled":
        factor_A, factor_B = (sum(all_columns) / k) ** 0.25, (sum(all_rows) / k) ** 0.5

    def own(stream: str, sizes: list[int], values: torch.Tensor) -> torch.Tensor:
        """The layer's part of what is made for all layers at once."""
        basis = pranc_basis(config, ("pranc", config.basis, stream), sum(sizes)).to(values.dtype)
        return (values @ basis).split(sizes)[before]

    start = uniform(config.seed, ("pranc", config.basis, "A", "offset"), sum(all_columns)).split(all_columns)[before]
    A = start.to(coefficients.dtype) * 0.1 / math.sqrt(columns) + own("A", all_columns, factor_A * coefficients)
    B = own("B", all_rows, factor_B * coefficients)
    A, B, scaling = A.view(r, columns), B.view(rows, r), config.alpha / r
    return Update(scaling * B @ A, factors=(A, B), scaling=scaling)


def mcnc(
    config: McncConfig, layer: nn.Module, name: str, coefficients: torch.Tensor, shapes: Shapes, before: int
) -> Update:
    """Chunks that fill A, beside its random start, and B; or the weight, scaled by `1 / sqrt(fan_in)`."""
    out_features, in_features = matrix_shape(layer)
    scaled = config.parametrization == "scaled"
    version = config.factors_version if scaled and config.apply_to == "factors" else 0
    d, widths = config.d or (500 if version == 4 else 5000), tuple(config.widths)
    stream = ("mcnc", "phi", config.k, *widths, d)
    phase, start_of_A = (150.0, 0.1) if version in (3, 4) else (50.0, 1.0)
    rest = coefficients

    def chunks(size: int, amplitude: float) -> torch.Tensor:
        nonlocal rest
        number = math.ceil(size / d)
        own, rest = rest[: number * (config.k + 1)], rest[number * (config.k + 1) :]
        if scaled:
            own = own * own.new_tensor([*config.k * [phase / config.frequency], amplitude]).repeat(number)
        return on_manifold(
            own, config.seed, stream, size, config.k, d, widths, config.activation, config.frequency, config.normalize
        )

    if config.apply_to == "weight":
        size = out_features * in_features
        weight = chunks(size, math.sqrt(min(d, size))).view(out_features, in_features) / math.sqrt(in_features)
        assert not len(rest)
        return Update(weight)
    r = config.r
    size_A, size_B = r * in_features, out_features * r
    if scaled:
        shared_A, shared_B = (min(d, size) / (config.k + 1) for size in (size_A, size_B))
        A, B = chunks(size_A, shared_A**0.25), chunks(size_B, shared_B**0.5)
    else:
        A, B = chunks(size_A + size_B, 1.0).split([size_A, size_B])
    assert not len(rest)
    start = uniform(config.seed, ("mcnc", "A", r, in_features, "offset"), r * in_features).to(A.dtype)
    A, B = (A + start_of_A * start / math.sqrt(in_features)).view(r, in_features), B.view(out_features, r)
    return Update(config.alpha / r * B @ A, factors=(A, B), scaling=config.alpha / r)


REFERENCES: dict[type, Callable[..., Update]] = {NolaConfig: nola, PrancConfig: pranc, McncConfig: mcnc}


# Models


def coefficients_of(model: nn.Module, adapter: str = "default") -> dict[str, torch.Tensor]:
    """The coefficients of an adapter in a PEFT model, by the name of the layer that owns them in the base model."""
    found = {}
    for name, parameter in model.named_parameters():
        owner, coefficients, key = re.sub(r"\.((?:nola|pranc|mcnc)_coefficients)\.", r"|\1|", name).partition("|")
        if coefficients and key.partition("|")[2] == f"{adapter}.values":
            found[owner.removeprefix(PREFIX)] = parameter
    return found


def targets(base: nn.Module, config: Any) -> list[str]:
    """The layers that a configuration with names of targets adapts, in the order of the model."""
    names = config.target_modules
    assert isinstance(names, set)
    return [name for name, _ in base.named_modules() if any(f".{name}".endswith(f".{target}") for target in names)]


def layer_update(config: Any, base: nn.Module, name: str, coefficients: dict[str, torch.Tensor]) -> Update:
    """The update of one layer. PRANC's one vector is with the first."""
    value = next(iter(coefficients.values())) if isinstance(config, PrancConfig) else coefficients[name]
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    adapted = targets(base, config)
    shapes = [matrix_shape(base.get_submodule(each)) for each in adapted]
    return REFERENCES[type(config)](config, base.get_submodule(name), name, value, shapes, adapted.index(name))


def updates(config: Any, base: nn.Module, coefficients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What an adapter adds to the parameters of the base model, by their names and in their shapes."""
    found = {}
    for name in targets(base, config) if isinstance(config, PrancConfig) else coefficients:
        layer, update = base.get_submodule(name), layer_update(config, base, name, coefficients)
        if vectors(layer):
            parameters = dict(layer.named_parameters())
            parts = update.weight.flatten().split([parameter.numel() for parameter in parameters.values()])
            found.update({f"{name}.{key}": part for key, part in zip(parameters, parts)})
            continue
        delta = update.weight.T if isinstance(layer, (nn.Embedding, Conv1D)) else update.weight
        assert isinstance(layer.weight, torch.Tensor)
        found[f"{name}.weight"] = delta.reshape(layer.weight.shape)
        if update.bias is not None:
            found[f"{name}.bias"] = update.bias
    return found


def run_dense(base: nn.Module, config: Any, coefficients: dict[str, torch.Tensor], call: Callable[..., Any]) -> Any:
    """`call(base)` with every update added to the weights of `base`, differentiable in the coefficients."""
    weights = {
        name: base.get_parameter(name) + delta.to(base.get_parameter(name).dtype)
        for name, delta in updates(config, base, coefficients).items()
    }

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = base

        def forward(self) -> Any:
            return call(self.model)

    return torch.func.functional_call(Called(), {f"model.{name}": weight for name, weight in weights.items()}, ())


def dense_gradients(
    base: nn.Module, config: Any, model: nn.Module, loss: Callable[..., torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Gradients of `loss(model)` with respect to the coefficients of a PEFT model, by the dense computation."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in coefficients_of(model).items()}
    value = run_dense(base, config, leaves, loss)
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found)
    }
