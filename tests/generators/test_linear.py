"""RandomBasis against a dense reference."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_ext import randomness
from peft_ext.generators import RandomBasis, linear
from peft_ext.generators.base import Frozen

STREAM = ("test", 1)


def reference(basis: RandomBasis, coefficients: torch.Tensor) -> torch.Tensor:
    """Number i * size + j of the stream, read one row at a time."""
    rows = [
        randomness.uniform(basis.seed, (*basis.stream, "basis"), basis.size, i * basis.size)
        for i in range(basis.num_basis)
    ]
    offset = randomness.uniform(basis.seed, (*basis.stream, "offset"), basis.size) * basis.offset_scale
    return coefficients.double() @ torch.stack(rows).double() * basis.scale + offset.double()


@pytest.fixture(params=[False, True], ids=["stored", "streamed"])
def streamed(request, monkeypatch):
    monkeypatch.setattr(linear, "_CHUNK", 16)  # so that small bases are cut in both directions
    return request.param


@settings(max_examples=40, deadline=None)
@given(
    num_basis=st.integers(1, 9),
    size=st.integers(1, 40),
    lead=st.lists(st.integers(1, 3), max_size=2),
    streamed=st.booleans(),
    offset=st.sampled_from([0.0, 0.25]),
)
def test_expansion_equals_the_reference(num_basis, size, lead, streamed, offset):
    chunk, linear._CHUNK = linear._CHUNK, 16
    try:
        basis = RandomBasis(5, STREAM, num_basis, size, scale=0.5, offset_scale=offset, streamed=streamed)
        coefficients = torch.randn(*lead, num_basis, generator=torch.Generator().manual_seed(0))
        weights = basis.expand(coefficients)
    finally:
        linear._CHUNK = chunk
    assert weights.shape == (*lead, size) and weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), reference(basis, coefficients), atol=1e-5, rtol=1e-5)


def test_derivatives(streamed):
    basis = RandomBasis(5, STREAM, 6, 21, scale=0.3, offset_scale=0.1, streamed=streamed)
    coefficients = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(basis.expand, (coefficients,), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(basis.expand, (coefficients,))
    jacobian = torch.func.jacrev(basis.expand)(coefficients[0].detach())
    unit = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(jacobian.T, reference(basis, unit) - reference(basis, 0 * unit))
    torch.testing.assert_close(torch.func.vmap(torch.func.jacfwd(basis.expand))(coefficients.detach())[0], jacobian)
    grad = torch.randn(2, 21, dtype=torch.float64)
    (expected,) = torch.autograd.grad(basis.expand(coefficients), coefficients, grad)
    torch.testing.assert_close(basis.vjp(coefficients, grad), expected)


def test_nothing_is_saved_for_backward(streamed):
    basis = RandomBasis(5, STREAM, 6, 21, scale=0.3, offset_scale=0.1, streamed=streamed)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor), lambda packed: packed):
        weights = basis.expand(torch.randn(2, 6, requires_grad=True))
    assert weights.requires_grad and not saved
    for _ in range(2):  # so a graph can be walked again without being retained
        weights.sum().backward()


def test_a_streamed_basis_is_never_held(streamed, monkeypatch):
    drawn = []
    draw = randomness.uniform
    monkeypatch.setattr(randomness, "uniform", lambda *args: drawn.append(args[2]) or draw(*args))
    basis = RandomBasis(5, STREAM, 6, 21, streamed=streamed)
    coefficients = torch.randn(6, requires_grad=True)
    basis.expand(coefficients).sum().backward()
    basis.expand(coefficients)
    if streamed:
        assert max(drawn) <= 16 and sum(drawn) == 3 * 6 * 21  # two forward passes and a backward pass
        assert basis.nbytes == 0
    else:
        assert drawn == [6 * 21]
        assert basis.nbytes == 4 * 6 * 21


def test_independent_of_autocast_and_default_dtype():
    coefficients = torch.randn(3, 6)
    expected = RandomBasis(5, STREAM, 6, 21, offset_scale=0.1).expand(coefficients)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
            found = RandomBasis(5, STREAM, 6, 21, offset_scale=0.1).expand(coefficients)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_made_under_inference_mode_then_trained():
    basis = RandomBasis(5, STREAM, 6, 21, offset_scale=0.1)
    with torch.inference_mode():
        basis.expand(torch.randn(6))
    coefficients = torch.randn(6, requires_grad=True)
    (basis.expand(coefficients) ** 2).sum().backward()
    assert coefficients.grad is not None and coefficients.grad.abs().max() > 0


def test_half_precision_coefficients_expand_in_float32():
    basis = RandomBasis(5, STREAM, 6, 21)
    coefficients = torch.randn(6).bfloat16().requires_grad_()
    weights = basis.expand(coefficients)
    assert weights.dtype == torch.float32
    weights.sum().backward()
    assert coefficients.grad is not None and coefficients.grad.dtype == torch.bfloat16


def test_meta_coefficients_draw_nothing():
    basis = RandomBasis(5, STREAM, 6, 21, offset_scale=0.1)
    weights = basis.expand(torch.empty(2, 6, device="meta"))
    assert weights.is_meta and weights.shape == (2, 21) and basis.nbytes == 0


def test_a_larger_basis_begins_with_the_smaller():
    small, large = RandomBasis(5, STREAM, 3, 8), RandomBasis(5, STREAM, 7, 8)
    assert torch.equal(small.expand(torch.eye(3)), large.expand(torch.eye(7))[:3])


def test_equal_numbers_are_in_memory_once_while_in_use():
    first = RandomBasis(5, STREAM, 3, 8, scale=0.5)
    assert RandomBasis(5, STREAM, 3, 8, scale=0.5) == first
    assert RandomBasis(5, STREAM, 3, 8, scale=0.25) != first
    assert RandomBasis(5, STREAM, 3, 8, scale=0.25).frozen[0] is first.frozen[0]
    assert RandomBasis(6, STREAM, 3, 8, scale=0.5).frozen[0] is not first.frozen[0]
    number = len(Frozen._shared)
    del first
    gc.collect()
    assert len(Frozen._shared) < number


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda basis: pickle.loads(pickle.dumps(basis))])
def test_copies_share_the_numbers_and_pickles_hold_none(clone, streamed):
    basis = RandomBasis(5, STREAM, 3, 8, offset_scale=0.1, streamed=streamed)
    size = len(pickle.dumps(basis))
    expected = basis.expand(torch.eye(3))
    other = clone(basis)
    assert other == basis and torch.equal(other.expand(torch.eye(3)), expected)
    assert streamed or other.frozen[0] is basis.frozen[0]
    assert len(pickle.dumps(basis)) == size


def test_coefficients_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"`coefficients` must have 3 entries in the last dimension, got shape \(4,\)"):
        RandomBasis(5, STREAM, 3, 8).expand(torch.zeros(4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_holds_the_same_numbers_and_the_cpu_no_copy():
    basis = RandomBasis(5, STREAM, 3, 8)
    expected = basis.expand(torch.eye(3))
    assert torch.equal(basis.expand(torch.eye(3, device="cuda")).cpu(), expected)
    assert basis.nbytes == 4 * 3 * 8
