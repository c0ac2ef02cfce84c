"""SineManifold."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from dense import FUNCTIONS, on_manifold
from generator_cases import GeneratorCases
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_ext import randomness
from peft_ext.generators import SineManifold

STREAM = ("test", 1)
OFFSET = {"offset_stream": ("test", "offset"), "offset_size": 9, "offset_scale": 0.5}


def manifold_reference(manifold: SineManifold, coefficients: torch.Tensor) -> torch.Tensor:
    weights = manifold.scale * on_manifold(
        coefficients, manifold.seed, manifold.stream, manifold.size, manifold.k, manifold.d, manifold.widths,
        manifold.activation, manifold.frequency, manifold.normalize,
    )  # fmt: skip
    offset = torch.zeros(manifold.size, dtype=torch.float64)
    if manifold.offset_size:
        drawn = randomness.uniform(manifold.seed, manifold.offset_stream, manifold.offset_size).double()
        offset[: manifold.offset_size] = drawn * manifold.offset_scale
    return weights + offset


class ManifoldCases(GeneratorCases):
    def reference(self, generator: SineManifold, coefficients: torch.Tensor) -> torch.Tensor:
        return manifold_reference(generator, coefficients)


class TestActivations(ManifoldCases):
    """Three chunks of which the last is shorter."""

    @pytest.fixture(params=FUNCTIONS)
    def make(self, request: pytest.FixtureRequest) -> Callable[[], SineManifold]:
        return partial(SineManifold, 5, STREAM, 20, 3, 8, (5, 6), request.param, scale=0.7, **OFFSET)


VARIANTS: dict[str, dict[str, Any]] = {
    "not normalised": {"normalize": False},
    "not normalised, offset": {"normalize": False, "activation": "relu", **OFFSET},
    "no offset": {},
    "offset everywhere": {**OFFSET, "offset_size": 20},
    "frequency": {"frequency": 4.5, "activation": "tanh", **OFFSET},
    "frequency, linear": {"frequency": 4.5, "activation": "none", "normalize": False},
    "no hidden layers": {"widths": ()},
    "no hidden layers, not normalised": {"widths": (), "normalize": False, "frequency": 2.0, "scale": 0.5},
    "one hidden layer": {"widths": (4,), **OFFSET},
    "whole chunks": {"d": 10},
    "one chunk": {"d": 20, **OFFSET},
    "a chunk cut off": {"d": 30},
    "one input": {"k": 1, "d": 7},
}


class TestVariants(ManifoldCases):
    @pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
    def make(self, request: pytest.FixtureRequest) -> Callable[[], SineManifold]:
        return partial(SineManifold, 5, STREAM, **{"size": 20, "k": 3, "d": 8, "widths": (5, 6), **request.param})


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 50),
    k=st.integers(1, 5),
    d=st.integers(1, 20),
    widths=st.lists(st.integers(1, 6), max_size=3),
    activation=st.sampled_from(["sine", "tanh", "none"]),
    frequency=st.floats(0.1, 5),
    scale=st.floats(0.1, 2),
    offset=st.floats(0, 1),
)
def test_any_manifold(
    size: int, k: int, d: int, widths: list[int], activation: str, frequency: float, scale: float, offset: float
) -> None:
    manifold = SineManifold(
        5, STREAM, size, k, d, tuple(widths), activation, frequency, scale=scale,
        offset_stream=("test", "offset"), offset_size=int(offset * size), offset_scale=0.5,
    )  # fmt: skip
    chunks = math.ceil(size / d)
    assert manifold.num_chunks == chunks and manifold.num_coefficients == chunks * (k + 1)
    coefficients = torch.randn(
        2, manifold.num_coefficients, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    expected = manifold_reference(manifold, coefficients)
    torch.testing.assert_close(manifold.expand(coefficients), expected, rtol=1e-4, atol=1e-4)


def test_amplitudes_scale_chunks() -> None:
    manifold = SineManifold(5, STREAM, 20, 3, 8, (5, 6), scale=0.5)
    coefficients = torch.randn(3, 4)
    once = manifold.expand(coefficients.flatten())
    coefficients[:, 3] *= torch.tensor([2.0, 0.0, -1.0])
    factors = torch.tensor([2.0, 0.0, -1.0]).repeat_interleave(8)[:20]
    torch.testing.assert_close(manifold.expand(coefficients.flatten()), once * factors)
    # Normalised, a whole chunk has the root mean square of its amplitude times the scale.
    rms = once[:8].square().mean().sqrt()
    torch.testing.assert_close(rms, 0.5 * coefficients[0, 3].abs() / 2)


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_outputs_are_of_the_order_of_one(activation: str) -> None:
    """Without normalisation too, whatever the activation and the depth."""
    manifold = SineManifold(5, STREAM, 200 * 64, 8, 64, (64, 64, 64), activation, normalize=False)
    coefficients = torch.randn(200, 9, generator=torch.Generator().manual_seed(0))
    coefficients[:, 8] = 1.0
    rms = manifold.expand(coefficients.flatten()).square().mean().sqrt()
    assert 0.4 < rms < 2


def test_no_gradient_is_lost_where_the_amplitude_is_zero() -> None:
    manifold = SineManifold(5, STREAM, 20, 3, 8, (5, 6), **OFFSET)
    coefficients = torch.randn(3, 4)
    coefficients[:, 3] = 0
    leaf = coefficients.flatten().requires_grad_()
    manifold.expand(leaf).sum().backward()
    assert leaf.grad is not None
    grad = leaf.grad.view(3, 4)
    assert not grad[:, :3].any() and grad[:, 3].all()


def test_inputs_of_zero_do_not_divide_by_zero() -> None:
    """phi(0) = 0 has no direction to normalise."""
    manifold = SineManifold(5, STREAM, 20, 3, 8, (5, 6))
    leaf = torch.zeros(12, requires_grad=True)
    weights = manifold.expand(leaf)
    weights.square().sum().backward()
    assert not weights.any() and leaf.grad is not None and leaf.grad.isfinite().all()


def test_generators_of_one_network_hold_it_once() -> None:
    first = SineManifold(5, STREAM, 20, 3, 8, (5, 6))
    other = SineManifold(5, STREAM, 44, 3, 8, (5, 6), scale=0.5, **OFFSET)
    assert first != other and all(a is b for a, b in zip(first.frozen, other.frozen))
    first.expand(torch.zeros(12))
    assert first.nbytes == 4 * (3 * 5 + 5 * 6 + 6 * 8)
    other.expand(torch.zeros(24))
    assert other.nbytes == first.nbytes + 4 * 9


def test_coefficients_changed_in_place_before_the_backward_pass() -> None:
    """An error, as in torch's own functions."""
    leaf = torch.randn(12, requires_grad=True)
    total = SineManifold(5, STREAM, 20, 3, 8, (5, 6)).expand(leaf).sum()
    with torch.no_grad():
        leaf.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place.*between the forward and the backward pass"):
        total.backward()


def test_known_numbers() -> None:
    """The specification is frozen: these are what saved adapters mean."""
    coefficients = torch.linspace(-1, 1, 8)
    weights = SineManifold(5, STREAM, 6, 3, 4, (5, 6)).expand(coefficients)
    expected = torch.tensor([-0.1220756, 0.0218532, -0.0891671, -0.2414577, -0.5948376, 0.7135566])
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)
    manifold = SineManifold(5, STREAM, 6, 3, 4, (5,), "tanh", 2.0, False, 0.5, ("test", "offset"), 2, 0.1)
    expected = torch.tensor([-0.1309294, 0.0560615, -0.0225508, 0.0728807, -1.0196319, 0.5376987])
    torch.testing.assert_close(manifold.expand(coefficients), expected, rtol=0, atol=1e-5)
