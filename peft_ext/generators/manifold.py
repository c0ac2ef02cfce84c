"""Nonlinear generators."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import forward_ad

from .. import randomness
from .base import Frozen, Generator, autocast_off, uniform_tensor

# Activation and derivative.
ACTIVATIONS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]] = {
    "sine": (torch.sin, torch.cos),
    "relu": (torch.relu, lambda x: (x > 0).to(x.dtype)),
    "tanh": (torch.tanh, lambda x: 1 - torch.tanh(x).square()),
    "none": (lambda x: x, torch.ones_like),
}
# What keeps the variance of a layer's outputs near 1: the usual gains, and SIREN's for the sine (arXiv 2006.09661).
_GAINS = {"sine": math.sqrt(2), "relu": math.sqrt(2), "tanh": 5 / 3, "none": 1.0}


@dataclass(frozen=True, repr=False)
class SineManifold(Generator):
    """`offset + scale * concat_i(beta_i * phi(alpha_i))` for a frozen random network `phi: R^k -> R^d`.

    The weights are cut into chunks of `d`, the last of which may be shorter. A chunk has k inputs alpha and an
    amplitude beta, and a coefficient vector is `(alpha_1, beta_1, alpha_2, beta_2, ...)`. With
    `f = activation`, `phi(alpha) = f(... f(frequency * alpha @ W_1) @ W_2 ...) @ W_n` without biases (MCNC, arXiv
    2406.19301, section 3). The entries of `W_i` are uniform, stream `(*stream, "layer", i - 1)`; their variance is
    `gain**2 / fan_in` with 1 for the first gain and the usual one of the activation for the others, so that outputs
    are of the order of 1.

    Args:
        seed: 0 to 2**64 - 1.
        stream: name of phi; all generators of equal seed, stream and network share its weights in memory.
        size: number of weights.
        k: inputs of phi.
        d: outputs of phi.
        widths: of the hidden layers.
        activation: `"sine"`, `"relu"`, `"tanh"` or `"none"`.
        frequency: factor on the inputs of the first activation.
        normalize: scale phi's outputs to a root mean square of exactly 1, that is onto a sphere.
        scale: factor on all chunks.
        offset_stream: stream of the constant that is added; none if empty.
        offset_size: the constant is added to the first `offset_size` weights only.
        offset_scale: factor on the constant, whose entries are uniform on [-offset_scale, offset_scale).
        version: of the randomness specification.
    """

    seed: int
    stream: tuple[str | int, ...]
    size: int
    k: int
    d: int
    widths: tuple[int, ...]
    activation: str = "sine"
    frequency: float = 1.0
    normalize: bool = True
    scale: float = 1.0
    offset_stream: tuple[str | int, ...] = ()
    offset_size: int = 0
    offset_scale: float = 0.0
    version: int = randomness.GENERATOR_VERSION
    _layers: tuple[Frozen, ...] = field(init=False, compare=False)
    _offset: Frozen = field(init=False, compare=False)

    def __post_init__(self) -> None:
        sizes = (self.k, *self.widths, self.d)
        layers = []
        for i, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:])):
            gain = _GAINS[self.activation] if i else 1.0
            stream = (*self.stream, "layer", i)
            factor = gain * math.sqrt(3 / fan_in)
            layers.append(Frozen.shared(uniform_tensor, self.seed, stream, (fan_in, fan_out), factor, self.version))
        object.__setattr__(self, "_layers", tuple(layers))
        offset = (self.seed, self.offset_stream, (self.offset_size,), self.offset_scale, self.version)
        object.__setattr__(self, "_offset", Frozen.shared(uniform_tensor, *offset))

    @property
    def num_chunks(self) -> int:
        return -(-self.size // self.d)

    @property
    def num_coefficients(self) -> int:  # type: ignore[override]
        return self.num_chunks * (self.k + 1)

    @property
    def frozen(self) -> tuple[Frozen, ...]:
        return (*self._layers, self._offset) if self.offset_size else self._layers

    @property
    def frozen_sizes(self) -> tuple[int, ...]:
        sizes = (self.k, *self.widths, self.d)
        layers = [fan_in * fan_out for fan_in, fan_out in zip(sizes, sizes[1:])]
        return (*layers, self.offset_size)[: len(self.frozen)]

    def _expand(self, coefficients: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or _is_transformed():
            return self._generate(coefficients)
        return self._differentiable(coefficients)

    @torch.compiler.disable
    def _differentiable(self, coefficients: torch.Tensor) -> torch.Tensor:
        # A view keeps the numbers that are expanded if the parameter gets others through `.data`.
        return _Generated.apply(coefficients.view_as(coefficients), self)

    def _generate(self, coefficients: torch.Tensor) -> torch.Tensor:
        with autocast_off(coefficients.device):
            _, out, _, beta = self._outputs(coefficients)
            flat = (out * (beta * self.scale)).flatten(-2)[..., : self.size]
            if not self.offset_size:
                return flat
            offset = self._offset.like(coefficients)
            return flat + torch.nn.functional.pad(offset, (0, self.size - self.offset_size))

    def _outputs(
        self, coefficients: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor | float, torch.Tensor]:
        """(inputs of the activations, phi(alpha), the factor that normalised it, beta): one row a chunk."""
        activation, _ = ACTIVATIONS[self.activation]
        # In one layout: how a product is summed up, and so its last bits, may depend on that of its factors.
        chunks = coefficients.contiguous().unflatten(-1, (self.num_chunks, self.k + 1))
        hidden, beta = chunks[..., : self.k] * self.frequency, chunks[..., self.k :]
        *layers, last = (layer.like(coefficients) for layer in self._layers)
        inputs = []
        for layer in layers:
            inputs.append(hidden @ layer)
            hidden = activation(inputs[-1])
        out = hidden @ last
        if not self.normalize:
            return inputs, out, 1.0, beta
        norm = (out.square().mean(-1, keepdim=True) + 1e-12).rsqrt()
        return inputs, out * norm, norm, beta

    def vjp(self, coefficients: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        with autocast_off(grad.device):
            _, derivative = ACTIVATIONS[self.activation]
            inputs, out, norm, beta = self._outputs(coefficients.to(grad.dtype))
            grad = torch.nn.functional.pad(grad * self.scale, (0, self.num_chunks * self.d - self.size))
            grad = grad.reshape(*grad.shape[:-1], self.num_chunks, self.d)
            grad_beta = (grad * out).sum(-1, keepdim=True)
            grad = grad * beta
            if self.normalize:
                grad = (grad - out * (grad * out).mean(-1, keepdim=True)) * norm
            first, *layers = (layer.like(grad) for layer in self._layers)
            for layer, x in zip(reversed(layers), reversed(inputs)):
                grad = (grad @ layer.mT) * derivative(x)
            grad_alpha = grad @ first.mT * self.frequency
            found = torch.cat((grad_alpha, grad_beta), -1)
            return found.reshape(*found.shape[:-2], self.num_coefficients).to(coefficients.dtype)

    def __repr__(self) -> str:
        stream = ", ".join(map(str, self.stream))
        sizes = " -> ".join(map(str, (self.k, *self.widths, self.d)))
        return f"SineManifold({stream}: {self.num_chunks} x ({sizes}), {self.activation}, seed={self.seed})"


class _Generated(torch.autograd.Function):
    """`_generate`. No tensor is saved for the backward pass, which computes it again from the coefficients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(coefficients: torch.Tensor, generator: SineManifold) -> torch.Tensor:
        return generator._generate(coefficients)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.coefficients, ctx.generator = inputs
        ctx.version = None if ctx.coefficients.is_inference() else ctx.coefficients._version

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        if ctx.version is not None and ctx.version != ctx.coefficients._version:
            raise RuntimeError(
                "The coefficients of a SineManifold were changed in place between the forward and the backward pass: "
                "their gradient cannot be computed any more."
            )
        return ctx.generator.vjp(ctx.coefficients, grad), None


def _is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation looks on: they take ordinary operations best."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
