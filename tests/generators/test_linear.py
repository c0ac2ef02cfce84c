"""RandomBasis and SparseBasis."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from dense import dense_matrix, sparse_matrix
from generator_cases import GeneratorCases
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from peft_ext import randomness
from peft_ext.generators import RandomBasis, SparseBasis, linear

STREAM = ("test", 1)


@contextmanager
def chunks_of(numbers: int) -> Iterator[None]:
    """So many random numbers are drawn at once, and so many entries of tables read."""
    before = linear._CHUNK, linear._BLOCK
    linear._CHUNK = linear._BLOCK = numbers
    try:
        yield
    finally:
        linear._CHUNK, linear._BLOCK = before


@pytest.fixture(autouse=True)
def small_chunks() -> Iterator[None]:
    """Small bases are cut in both directions."""
    with chunks_of(16):
        yield


# Dense


def dense_reference(basis: RandomBasis, coefficients: torch.Tensor) -> torch.Tensor:
    offset = randomness.uniform(basis.seed, (*basis.stream, "offset"), basis.size) * basis.offset_scale
    matrix = dense_matrix(basis.seed, basis.stream, basis.num_basis, basis.size) * basis.scale
    return coefficients @ matrix + offset.double()


class TestRandomBasis(GeneratorCases):
    streamed = False

    @pytest.fixture(params=[0.0, 0.1], ids=["", "offset"])
    def make(self, request: pytest.FixtureRequest) -> Callable[[], RandomBasis]:
        options: dict[str, Any] = {"scale": 0.3, "offset_scale": request.param, "streamed": self.streamed}
        return partial(RandomBasis, 5, STREAM, 6, 21, **options)

    reference = staticmethod(dense_reference)

    def test_what_is_drawn_and_held(self, make: Callable[[], RandomBasis], monkeypatch: pytest.MonkeyPatch) -> None:
        drawn = []
        draw = randomness.uniform
        monkeypatch.setattr(randomness, "uniform", lambda *args: drawn.append(args[2]) or draw(*args))
        basis = make()
        offset = 21 if basis.offset_scale else 0
        coefficients = torch.randn(6, requires_grad=True)
        basis.expand(coefficients).sum().backward()
        basis.expand(coefficients)
        if self.streamed:  # two forward passes and a backward pass; the offset is as large as one vector
            assert max(n for n in drawn if n != 21) <= 16 and sum(drawn) == 3 * 6 * 21 + 2 * offset
            assert basis.nbytes == 0
        else:
            assert sum(drawn) == 6 * 21 + offset
            assert basis.nbytes == 4 * (6 * 21 + offset)


class TestStreamedRandomBasis(TestRandomBasis):
    streamed = True


@settings(max_examples=40, deadline=None)
@given(
    num_basis=st.integers(1, 9),
    size=st.integers(1, 40),
    lead=st.lists(st.integers(1, 3), max_size=2),
    streamed=st.booleans(),
    offset=st.sampled_from([0.0, 0.25]),
)
def test_any_dense_basis(num_basis: int, size: int, lead: list[int], streamed: bool, offset: float) -> None:
    basis = RandomBasis(5, STREAM, num_basis, size, scale=0.5, offset_scale=offset, streamed=streamed)
    coefficients = torch.randn(*lead, num_basis, generator=torch.Generator().manual_seed(0))
    weights = basis.expand(coefficients)
    assert weights.shape == (*lead, size) and weights.dtype == torch.float32
    expected = dense_reference(basis, coefficients.double())
    torch.testing.assert_close(weights.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_larger_basis_begins_with_the_smaller() -> None:
    small, large = RandomBasis(5, STREAM, 3, 8), RandomBasis(5, STREAM, 7, 8)
    assert torch.equal(small.expand(torch.eye(3)), large.expand(torch.eye(7))[:3])


def test_bases_that_differ_in_scale_hold_the_same_numbers() -> None:
    first = RandomBasis(5, STREAM, 3, 8, scale=0.5)
    assert RandomBasis(5, STREAM, 3, 8, scale=0.25) != first
    assert RandomBasis(5, STREAM, 3, 8, scale=0.25).frozen[0] is first.frozen[0]
    sparse = SparseBasis(5, STREAM, 3, 8, scale=0.5)
    assert SparseBasis(5, STREAM, 3, 8, scale=0.25) != sparse
    assert SparseBasis(5, STREAM, 3, 8, scale=0.25).frozen[0] is sparse.frozen[0]
    assert SparseBasis(5, STREAM, 3, 8, scale=0.5, nnz=2).frozen[0] is sparse.frozen[0]


def test_known_numbers_of_a_dense_basis() -> None:
    weights = RandomBasis(5, STREAM, 2, 4, offset_scale=0.5).expand(torch.tensor([1.0, 10.0]))
    expected = torch.tensor([10.0326605, -5.6558313, -4.8541126, 10.3053522])
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)


# Sparse


def sparse_weights(basis: SparseBasis, coefficients: torch.Tensor) -> torch.Tensor:
    """What a basis with one coefficient a weight and a last run of fewer weights makes, without the matrix."""
    k, (whole, rest) = basis.num_coefficients, divmod(basis.size, basis.num_coefficients)
    keys = randomness.uniform(basis.seed, (*basis.stream, "order", 0), (whole + 1) * k).view(-1, k)
    order = keys.argsort(dim=1, stable=True)
    factors = torch.full((k,), math.sqrt(basis.size / k / whole), dtype=torch.float32)
    factors[order[-1, :rest]] = math.sqrt(basis.size / k / (whole + 1))
    signs = torch.where(randomness.uniform(basis.seed, (*basis.stream, "sign", 0), basis.size) < 0, -1.0, 1.0)
    return (coefficients * factors * basis.scale)[order.flatten()[: basis.size]] * signs


def sparse_reference(basis: SparseBasis) -> torch.Tensor:
    return sparse_matrix(basis.seed, basis.stream, basis.num_coefficients, basis.size, basis.nnz) * basis.scale


class TestSparseBasis(GeneratorCases):
    @pytest.fixture(params=[1, 2, 3])
    def make(self, request: pytest.FixtureRequest) -> Callable[[], SparseBasis]:
        return partial(SparseBasis, 5, STREAM, 6, 21, scale=0.3, nnz=request.param)

    def reference(self, generator: SparseBasis, coefficients: torch.Tensor) -> torch.Tensor:
        return coefficients @ sparse_reference(generator)

    def test_linear_in_the_coefficients(self, generator: SparseBasis) -> None:
        x, y = self.draw(generator, 2)
        together = generator.expand(2 * x - 3 * y)
        torch.testing.assert_close(together, 2 * generator.expand(x) - 3 * generator.expand(y))
        assert not generator.expand(0 * x).any()

    def test_what_is_held(self, generator: SparseBasis) -> None:
        generator.expand(self.draw(generator))
        assert generator.nbytes == (2 * 21 + 4 * 6) * generator.nnz

    def test_a_pass_of_one_vector_widens_a_block_of_what_is_held(self, generator: SparseBasis) -> None:
        leaf = self.draw(generator, dtype=torch.float32).requires_grad_()
        generator.expand(leaf.detach())
        made: list[int] = []

        class Widened(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                found = func(*args, **(kwargs or {}))
                made.extend([found.numel()] if isinstance(found, torch.Tensor) and found.dtype == torch.int32 else [])
                return found

        with Widened():
            generator.expand(leaf).sum().backward()
        blocks = [16, generator.size - 16] if generator.size > 16 else [generator.size]
        assert made == 2 * generator.nnz * blocks


class TestSparseBasisOfFewWeights(TestSparseBasis):
    """Some coefficients are not read at all."""

    @pytest.fixture(params=[1, 2])
    def make(self, request: pytest.FixtureRequest) -> Callable[[], SparseBasis]:
        return partial(SparseBasis, 5, STREAM, 21, 6, scale=0.3, nnz=request.param)

    def test_what_is_held(self, generator: SparseBasis) -> None:
        generator.expand(self.draw(generator))
        assert generator.nbytes == (2 * 6 + 4 * 21) * generator.nnz
        read = (generator.expand(torch.eye(21)) != 0).any(1)
        assert read.sum() == 6 if generator.nnz == 1 else 6 <= read.sum() <= 12


# Lengths k with and without a shorter last run; k = size; more coefficients than weights.
sparse_bases = st.builds(
    SparseBasis,
    st.integers(0, 2**64 - 1),
    st.just(STREAM),
    st.integers(1, 30),
    st.integers(1, 60),
    scale=st.sampled_from([1.0, 0.25]),
    nnz=st.integers(1, 3),
)


@pytest.mark.parametrize(("k", "width"), [(16384, 2), (16385, 2), (32768, 2), (32769, 4)])
def test_what_weights_read_takes_two_bytes_where_it_fits(k: int, width: int) -> None:
    """Some weights read the last coefficients with the sign -1, which are the largest numbers held."""
    basis = SparseBasis(5, STREAM, k, k + 8)
    x = torch.randn(2, k, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([sparse_weights(basis, row) for row in x])
    with chunks_of(1 << 14):
        assert torch.equal(basis.expand(x), expected) and torch.equal(basis.expand(x[0]), expected[0])
        grad = torch.ones(k + 8, dtype=torch.float64)
        torch.testing.assert_close((basis.vjp(x[0], grad) * x[0]).sum(), expected[0].sum(), rtol=1e-12, atol=0)
    assert basis.frozen_nbytes == tuple(each.nbytes for each in basis.frozen) == (width * (k + 8), 4 * k)


@settings(max_examples=60, deadline=None)
@given(basis=sparse_bases, chunk=st.sampled_from([1, 16, 1 << 22]))
def test_any_sparse_basis(basis: SparseBasis, chunk: int) -> None:
    matrix = sparse_reference(basis)
    k, size = basis.num_coefficients, basis.size
    with chunks_of(chunk):
        found = basis.expand(torch.eye(k, dtype=torch.float64))
    torch.testing.assert_close(found, matrix, rtol=1e-6, atol=1e-6)

    numbers = torch.Generator().manual_seed(0)
    x = torch.randn(3, k, dtype=torch.float64, generator=numbers)
    y = torch.randn(3, size, dtype=torch.float64, generator=numbers)
    inner = (basis.expand(x) * y).sum(), (x * basis.vjp(x, y)).sum()
    torch.testing.assert_close(*inner, rtol=1e-12, atol=1e-12)

    if basis.nnz == 1:
        reads = (found != 0).sum(0)
        assert (reads == 1).all()  # disjoint supports
        if size >= k:
            gram = found @ found.T
            assert not (gram - gram.diag().diag()).any()
            norm = torch.full((k,), basis.scale**2 * size / k, dtype=torch.float64)
            torch.testing.assert_close(gram.diag(), norm, rtol=1e-6, atol=0)
        for start in range(0, size, k):  # every run of k weights reads every coefficient once
            entries = (found[:, start : start + k] != 0).sum(1)
            assert entries.max() == 1 and entries.sum() == min(k, size - start)


@pytest.mark.parametrize("size", [5, 6, 7, 24, 25, 64])
@pytest.mark.parametrize("nnz", [1, 2])
def test_chunks_do_not_change_a_sparse_basis(size: int, nnz: int) -> None:
    def expand(chunk: int) -> torch.Tensor:
        with chunks_of(chunk):
            return SparseBasis(5, STREAM, 6, size, nnz=nnz).expand(torch.eye(6))

    expected = expand(1 << 22)
    for chunk in (1, 6, 7, 12, 20, 64):
        assert torch.equal(expand(chunk), expected)


def test_a_longer_sparse_basis_begins_with_the_shorter() -> None:
    """But for the factor that gives all vectors one norm."""
    short, long = (SparseBasis(5, STREAM, 6, size).expand(torch.eye(6)).sign() for size in (14, 40))
    assert torch.equal(short, long[:, :14])


def test_signs_and_orders_are_random() -> None:
    basis = SparseBasis(5, STREAM, 50, 5000)
    signed = basis.expand(torch.ones(50))
    assert abs(signed.mean()) < 0.06  # four standard deviations
    orders = (basis.expand(torch.eye(50)) != 0).int().argmax(0).view(100, 50)
    assert len({tuple(order.tolist()) for order in orders}) == 100
    assert abs((orders[:, 0].float().mean() - 24.5) / (14.4 / 10)) < 4


def test_known_numbers_of_a_sparse_basis() -> None:
    """The specification is frozen: these are what saved adapters mean."""
    coefficients = torch.tensor([1.0, 10.0, 100.0])
    weights = SparseBasis(5, STREAM, 3, 9).expand(coefficients)
    assert weights.tolist() == [-10.0, 100.0, 1.0, 1.0, 10.0, -100.0, 10.0, -1.0, -100.0]
    weights = SparseBasis(5, STREAM, 3, 8, scale=0.5, nnz=2).expand(coefficients)
    expected = [0.7491494, 74.1581650, 0.6666667, 0.6666667, 36.6666679, -36.7423473, -30.0, -0.6666667]
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=1e-6, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    k=st.integers(1, 12),
    nnz=st.integers(1, 2),
    chunk=st.sampled_from([1, 16, 1 << 22]),
)
def test_parts_of_a_sparse_basis_are_parts_of_the_whole(sizes: list[int], k: int, nnz: int, chunk: int) -> None:
    """Of the weights, the offset and the vectors' norms, however the sequence is cut."""
    total, options = sum(sizes), {"scale": 0.3, "nnz": min(nnz, k), "offset_scale": 0.5}
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    with chunks_of(chunk):
        whole = SparseBasis(5, STREAM, k, total, **options).expand(torch.ones(k))
        parts = [
            SparseBasis(5, STREAM, k, size, **options, start=start, total=total).expand(torch.ones(k))
            for size, start in zip(sizes, starts)
        ]
    assert torch.equal(torch.cat(parts), whole)
