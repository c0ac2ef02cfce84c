"""Linear generators."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .. import randomness
from .base import Frozen, Generator, autocast_off, uniform_tensor

_CHUNK = 1 << 22  # random numbers in memory at once (16 MiB)
_BLOCK = 1 << 18  # entries of a table in 16 bits that are widened at once (1 MiB, which a cache holds)


class LinearGenerator(Generator):
    """`coefficients @ basis`, perhaps with a constant offset. The backward pass needs the basis alone."""

    streamed = False
    offset_scale: float = 0.0
    _offset: Frozen

    @abstractmethod
    def _product(self, x: torch.Tensor, adjoint: bool) -> torch.Tensor:
        """`x @ basis`, or `x @ basis.T` for the adjoint; the last dimension of `x` is the one multiplied."""

    def _keep_offset(self, seed: int, stream: tuple[str | int, ...], version: int, start: int = 0) -> None:
        """Makes the offset of numbers of a stream; it is drawn at first use, if there is one."""
        offset = (uniform_tensor, seed, (*stream, "offset"), (self.size,), self.offset_scale, version, start)
        object.__setattr__(self, "_offset", Frozen(*offset, keep=False) if self.streamed else Frozen.shared(*offset))

    def _expand(self, coefficients: torch.Tensor) -> torch.Tensor:
        return self.with_offset(self._combined(coefficients))

    def with_offset(self, combined: torch.Tensor) -> torch.Tensor:
        """The weights, from `coefficients @ basis`."""
        return combined + self._offset.like(combined) if self.offset_scale else combined

    def _combined(self, coefficients: torch.Tensor) -> torch.Tensor:
        """`coefficients @ basis`."""
        if torch.compiler.is_compiling() and (not self.streamed or torch.compiler.is_exporting()):
            # The compiler differentiates and plans memory itself: give it the plain product. In an exported program
            # nothing is drawn: it holds the basis.
            with autocast_off(coefficients.device):
                return self._product(coefficients, adjoint=False)
        return self._differentiable_product(coefficients)

    def vjp(self, coefficients: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        with autocast_off(grad.device):
            return self._product(grad, adjoint=True).to(coefficients.dtype)

    @torch.compiler.disable
    def _differentiable_product(self, x: torch.Tensor) -> torch.Tensor:
        return _Product.apply(x, self, False)


@dataclass(frozen=True, repr=False)
class RandomBasis(LinearGenerator):
    """`offset + scale * coefficients @ basis` for a frozen dense basis that is regenerated from a seed.

    Entry `(i, j)` of the basis is number `i * size + j` of the seed's stream `(*stream, "basis")`, so a basis with
    more vectors begins with those of a smaller one. The offset is the start of the stream `(*stream, "offset")`.

    A stored basis is made at first use, once per device, and shared by all generators of the same numbers. A streamed
    basis is never kept: chunks of it are drawn again in every forward and backward pass.

    Args:
        seed: 0 to 2**64 - 1.
        stream: name of the basis; see `peft_ext.randomness`.
        num_basis: number of vectors, the length of a coefficient vector.
        size: numbers in each vector.
        scale: factor on the basis; its entries are uniform on [-scale, scale).
        offset_scale: factor on the offset; 0 for none.
        streamed: draw the basis again at each use, in O(chunk) memory, instead of keeping it.
        version: of the randomness specification.
    """

    seed: int
    stream: tuple[str | int, ...]
    num_basis: int
    size: int
    scale: float = 1.0
    offset_scale: float = 0.0
    streamed: bool = False
    version: int = randomness.GENERATOR_VERSION
    _basis: Frozen = field(init=False, compare=False)
    _offset: Frozen = field(init=False, compare=False)

    @property
    def num_coefficients(self) -> int:  # type: ignore[override]
        return self.num_basis

    def __post_init__(self) -> None:
        basis = (uniform_tensor, self.seed, (*self.stream, "basis"), (self.num_basis, self.size), 1.0, self.version)
        # A streamed basis is never asked for its tensor.
        object.__setattr__(self, "_basis", Frozen.shared(*basis))
        self._keep_offset(self.seed, self.stream, self.version)

    @property
    def frozen(self) -> tuple[Frozen, ...]:
        if self.streamed:
            return ()
        return (self._basis, self._offset) if self.offset_scale else (self._basis,)

    @property
    def frozen_sizes(self) -> tuple[int, ...]:
        return (self.num_basis * self.size, self.size)[: len(self.frozen)]

    def _product(self, x: torch.Tensor, adjoint: bool) -> torch.Tensor:
        x = x * self.scale
        if not self.streamed:
            matrix = self._basis.like(x)
            return x @ (matrix.mT if adjoint else matrix)
        result = x.new_zeros(*x.shape[:-1], self.num_basis if adjoint else self.size)
        for rows, columns, block in self._blocks():
            block = block.to(x)
            if adjoint:
                _part(result, rows).add_(_part(x, columns) @ block.mT)
            else:
                _part(result, columns).add_(_part(x, rows) @ block)
        return result

    def _blocks(self) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """Cuts the basis into blocks of at most `_CHUNK` numbers: (rows, columns, block)."""
        height = max(1, _CHUNK // self.size)
        width = min(self.size, _CHUNK)
        for top in range(0, self.num_basis, height):
            rows = slice(top, min(top + height, self.num_basis))
            for left in range(0, self.size, width):
                columns = slice(left, min(left + width, self.size))
                count = (rows.stop - rows.start) * (columns.stop - columns.start)
                yield rows, columns, self._draw(count, top * self.size + left).view(rows.stop - top, -1)

    @torch.compiler.assume_constant_result  # torch.compile does not come here, torch.export does
    def _draw(self, count: int, start: int) -> torch.Tensor:
        return randomness.uniform(self.seed, (*self.stream, "basis"), count, start, self.version)

    def __repr__(self) -> str:
        stream = ", ".join(map(str, self.stream))
        return f"RandomBasis({stream}: {self.num_basis} x {self.size}, seed={self.seed})"


def _part(x: torch.Tensor, span: slice) -> torch.Tensor:
    """A view of the last dimension; batched gradients know no indexing that takes all of it."""
    return x.narrow(-1, span.start, min(span.stop, x.shape[-1]) - span.start)


@dataclass(frozen=True, repr=False)
class SparseBasis(LinearGenerator):
    """`offset + scale * coefficients @ basis` for a frozen basis with `nnz` nonzero entries in every column.

    The weights can be a part of a longer sequence: the `size` ones from weight `start` on. What follows is said of the
    whole sequence, of `total` weights, and of its streams.

    Each of the weights reads `nnz` coefficients, each with a random sign. The weights are cut into runs of
    `num_coefficients`, and every run reads each coefficient once, in an order of its own; the last run may be
    shorter. So with `nnz=1` the vectors of the basis have disjoint supports: they are orthogonal, and a factor next
    to 1 gives them one and the same norm, `scale * sqrt(size / num_coefficients)`. (Where there are fewer weights
    than coefficients, some coefficients are not read at all.) The idea is UniLoRA's projection (arXiv 2506.00799).

    The order of run `i` sorts the numbers `i * num_coefficients` onwards of the seed's stream
    `(*stream, "order", t)`, equal numbers in their order of appearance; weight `j` has the sign of number `j` of
    `(*stream, "sign", t)`. `t` counts the coefficients that a weight reads. The offset is the start of the stream
    `(*stream, "offset")`.

    What a weight of the whole sequence reads is kept in memory, once for all its parts, in two bytes for up to 32,768
    coefficients and in four for more.

    Args:
        seed: 0 to 2**64 - 1.
        stream: name of the basis; see `peft_ext.randomness`.
        num_coefficients: length of a coefficient vector.
        size: number of weights.
        scale: root mean square of a weight when that of the coefficients is 1.
        nnz: coefficients that a weight reads, times `1 / sqrt(nnz)`.
        offset_scale: factor on the offset, whose entries are uniform on [-1, 1) before; 0 for none.
        start: the place of the first weight in the whole sequence.
        total: weights of the whole sequence; `size` if 0.
        version: of the randomness specification.
    """

    seed: int
    stream: tuple[str | int, ...]
    num_coefficients: int
    size: int
    scale: float = 1.0
    nnz: int = 1
    offset_scale: float = 0.0
    start: int = 0
    total: int = 0
    version: int = randomness.GENERATOR_VERSION
    _reads: tuple[Frozen, ...] = field(init=False, compare=False)
    _factors: tuple[Frozen, ...] = field(init=False, compare=False)
    _offset: Frozen = field(init=False, compare=False)

    def __post_init__(self) -> None:
        given = self.num_coefficients, self._total, self.version
        for name, make in (("_reads", _signed_assignment), ("_factors", _column_factors)):
            frozen = [Frozen.shared(make, self.seed, self.stream, t, *given) for t in range(self.nnz)]
            object.__setattr__(self, name, tuple(frozen))
        self._keep_offset(self.seed, self.stream, self.version, self.start)

    @property
    def whole(self) -> SparseBasis:
        """That of the whole sequence which the weights are a part of, without the offset."""
        return replace(self, start=0, size=self._total, offset_scale=0.0)

    @property
    def _total(self) -> int:
        return self.total or self.size

    @property
    def frozen(self) -> tuple[Frozen, ...]:
        return *self._reads, *self._factors, *((self._offset,) if self.offset_scale else ())

    @property
    def frozen_sizes(self) -> tuple[int, ...]:
        return (self.nnz * (self._total,) + self.nnz * (self.num_coefficients,) + (self.size,))[: len(self.frozen)]

    @property
    def frozen_nbytes(self) -> tuple[int, ...]:
        read = index_type(self.num_coefficients).itemsize * self._total
        return self.nnz * (read,) + tuple(4 * size for size in self.frozen_sizes[self.nnz :])

    def _product(self, x: torch.Tensor, adjoint: bool) -> torch.Tensor:
        # Coefficient c with sign +1 is entry c of the table of 2 * num_coefficients, with sign -1 entry c + that many.
        if x.shape[:-1].numel() == 1 and x.dim() > 1:  # one vector: torch is ten times as fast without the dimension
            return self._product(x.flatten(), adjoint).view(*x.shape[:-1], -1)
        k, scale = self.num_coefficients, self.scale / math.sqrt(self.nnz)
        parts = []
        for read, factors in zip(self._reads, self._factors):
            index, factor = read.like(x)[self.start : self.start + self.size], factors.like(x)
            if adjoint:
                table = _spread(x, index, 2 * k)
                parts.append((table[..., :k] - table[..., k:]) * factor * scale)
            else:
                scaled = x * factor * scale
                parts.append(_read(torch.cat((scaled, -scaled), -1), index))
        return sum(parts[1:], parts[0])

    def __repr__(self) -> str:
        stream = ", ".join(map(str, self.stream))
        return f"SparseBasis({stream}: {self.num_coefficients} x {self.size}, seed={self.seed})"


def _read(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The entries of a table, `(..., entries)`, that an index names: `(..., len(index))`."""
    block = _block(table, index)
    if block >= len(index):
        return table.index_select(-1, _widened(index))
    result = table.new_empty(len(index))
    for part, names in zip(result.split(block), index.split(block)):
        torch.index_select(table, 0, _widened(names), out=part)
    return result


def _spread(x: torch.Tensor, index: torch.Tensor, entries: int) -> torch.Tensor:
    """The adjoint of `_read`: a table in which numbers `(..., len(index))` are added to the entries that they name."""
    table, block = x.new_zeros(*x.shape[:-1], entries), _block(x, index)
    if block >= len(index):
        return table.index_add(-1, _widened(index), x)
    for part, names in zip(x.split(block), index.split(block)):
        table.index_add_(0, _widened(names), part)
    return table


def _block(x: torch.Tensor, index: torch.Tensor) -> int:
    """How many entries of an index are widened at once: all, where only a CPU's cache would gain by fewer.

    Compiled code widens each where it is read, and `torch.func.vmap` has no operation that writes into a part.
    """
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    whole = index.itemsize > 2 or x.dim() > 1 or x.device.type != "cpu" or transformed or torch.compiler.is_compiling()
    return len(index) if whole else _BLOCK


def _widened(index: torch.Tensor) -> torch.Tensor:
    """An index in a type that torch indexes by."""
    return index.to(torch.int32) if index.itemsize == 2 else index


def index_type(num_coefficients: int) -> torch.dtype:
    """The smallest type that holds numbers below `2 * num_coefficients`; the unsigned one is not known everywhere."""
    types = (torch.int16, torch.uint16, torch.int32, torch.int64)
    return next(dtype for dtype in types if 2 * num_coefficients - 1 <= torch.iinfo(dtype).max)


def _signed_assignment(
    seed: int, stream: tuple[str | int, ...], t: int, num_coefficients: int, size: int, version: int
) -> torch.Tensor:
    """Which coefficient each weight reads, plus `num_coefficients` where its sign is -1: shape `(size,)`."""
    result = torch.empty(size, dtype=index_type(num_coefficients))
    step = max(1, _CHUNK // num_coefficients) * num_coefficients
    for start in range(0, size, step):
        runs = -(-min(step, size - start) // num_coefficients)
        keys = randomness.uniform(seed, (*stream, "order", t), runs * num_coefficients, start, version)
        order = keys.view(runs, num_coefficients).argsort(dim=1, stable=True).flatten()[: size - start]
        negative = randomness.uniform(seed, (*stream, "sign", t), len(order), start, version) < 0
        result[start : start + len(order)] = order + negative * num_coefficients
    return result


def _column_factors(
    seed: int, stream: tuple[str | int, ...], t: int, num_coefficients: int, size: int, version: int
) -> torch.Tensor:
    """What gives all vectors of the basis the same norm: those that the last run reads have an entry more."""
    whole_runs, rest = divmod(size, num_coefficients)
    factors = torch.ones(num_coefficients, dtype=torch.float32)
    if whole_runs and rest:
        ideal = size / num_coefficients
        start = whole_runs * num_coefficients
        keys = randomness.uniform(seed, (*stream, "order", t), num_coefficients, start, version)
        factors.fill_(math.sqrt(ideal / whole_runs))
        factors[keys.argsort(stable=True)[:rest]] = math.sqrt(ideal / (whole_runs + 1))
    return factors


class _Product(torch.autograd.Function):
    """`x @ basis` or its adjoint; each is the other's derivative. Nothing is saved for backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, basis: LinearGenerator, adjoint: bool) -> torch.Tensor:
        with autocast_off(x.device):
            return basis._product(x, adjoint)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, ctx.basis, ctx.adjoint = inputs

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return _Product.apply(grad, ctx.basis, not ctx.adjoint), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, *_: Any) -> torch.Tensor:  # type: ignore[override]
        return _Product.apply(tangent, ctx.basis, ctx.adjoint)
