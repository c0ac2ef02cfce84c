"""Linear generators."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .. import randomness

_CHUNK = 1 << 22  # numbers of a streamed basis in memory at once (16 MiB)


def autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    """Keeps weights from being generated in the low precision that autocast chooses for activations."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class RandomBasis:
    """`offset + scale * coefficients @ basis` for a frozen basis that is regenerated from a seed.

    Entry `(i, j)` of the basis is number `i * size + j` of the seed's stream `(*stream, "basis")`, so a basis with
    more vectors begins with those of a smaller one. The offset is the start of the stream `(*stream, "offset")`.

    A stored basis is made at first use, once per device, and shared by everything that asks for the same one through
    `shared`. A streamed basis is never kept: chunks of it are drawn again in every forward and backward pass.

    The map is linear, so its backward pass needs the basis alone: no tensor is saved for it. One expansion can
    therefore serve code that counts or offloads saved tensors (activation checkpointing) without being noticed.

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

    def __init__(
        self,
        seed: int,
        stream: tuple[str | int, ...],
        num_basis: int,
        size: int,
        *,
        scale: float = 1.0,
        offset_scale: float = 0.0,
        streamed: bool = False,
        version: int = randomness.GENERATOR_VERSION,
    ) -> None:
        self.seed = seed
        self.stream = stream
        self.num_basis = num_basis
        self.size = size
        self.scale = scale
        self.offset_scale = offset_scale
        self.streamed = streamed
        self.version = version
        self._stored: dict[tuple[str, torch.device], torch.Tensor] = {}

    _shared: weakref.WeakValueDictionary[tuple[Any, ...], RandomBasis] = weakref.WeakValueDictionary()

    @classmethod
    def shared(cls, seed: int, stream: tuple[str | int, ...], num_basis: int, size: int, **options: Any) -> RandomBasis:
        """The one basis of these arguments in this process, for as long as something uses it."""
        key = (cls, seed, stream, num_basis, size, *sorted(options.items()))
        basis = cls._shared.get(key)
        if basis is None:
            basis = cls._shared[key] = cls(seed, stream, num_basis, size, **options)
        return basis

    def expand(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Expands one or many coefficient vectors.

        Computed in at least float32 whatever the autocast state. Differentiable any number of times and usable under
        `torch.func` transforms.

        Args:
            coefficients: shape `(..., num_basis)`.

        Returns:
            Shape `(..., size)`; float64 for float64 coefficients, otherwise float32.

        Raises:
            ValueError: the last dimension is not `num_basis`.
        """
        if coefficients.shape[-1] != self.num_basis:
            raise ValueError(
                f"`coefficients` must have {self.num_basis} entries in the last dimension, got shape "
                f"{tuple(coefficients.shape)}."
            )
        coefficients = coefficients.to(torch.promote_types(coefficients.dtype, torch.float32))
        if torch.compiler.is_compiling() and not self.streamed:
            # The compiler differentiates and plans memory itself: give it the plain product.
            flat = self._product(coefficients, adjoint=False)
        else:
            flat = self._differentiable_product(coefficients)
        return flat + self._offset(coefficients) if self.offset_scale else flat

    @property
    def nbytes(self) -> int:
        """Memory that the basis holds now: 0 before its first use, and always if it is streamed."""
        return sum(tensor.nbytes for tensor in self._stored.values())

    def vjp(self, coefficients: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """The derivative of `(expand(coefficients) * grad).sum()`: shape and dtype of `coefficients`."""
        return self._product(grad, adjoint=True).to(coefficients.dtype)

    @torch.compiler.disable
    def _differentiable_product(self, x: torch.Tensor) -> torch.Tensor:
        return _Product.apply(x, self, False)

    def _product(self, x: torch.Tensor, adjoint: bool) -> torch.Tensor:
        """`scale * x @ basis`, or `scale * x @ basis.T` for the adjoint."""
        x = x * self.scale
        with autocast_off(x.device):
            if not self.streamed:
                matrix = self._matrix(x)
                return x @ (matrix.mT if adjoint else matrix)
            return self._streamed_product(x, adjoint)

    def _streamed_product(self, x: torch.Tensor, adjoint: bool) -> torch.Tensor:
        result = x.new_zeros(*x.shape[:-1], self.num_basis if adjoint else self.size)
        for rows, columns, block in self._blocks():
            block = block.to(x)
            if adjoint:
                result[..., rows] += x[..., columns] @ block.mT
            else:
                result[..., columns] += x[..., rows] @ block
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
                yield rows, columns, self._draw("basis", count, top * self.size + left).view(rows.stop - top, -1)

    def _matrix(self, like: torch.Tensor) -> torch.Tensor:
        return self._cached("basis", like, (self.num_basis, self.size))

    def _offset(self, like: torch.Tensor) -> torch.Tensor:
        if self.streamed:
            return (self._draw("offset", self.size) * self.offset_scale).to(like)
        return self._cached("offset", like, (self.size,), self.offset_scale)

    def _cached(self, part: str, like: torch.Tensor, shape: tuple[int, ...], factor: float = 1.0) -> torch.Tensor:
        tensor = self._stored.get((part, like.device))
        if tensor is None:
            if like.is_meta:
                return like.new_empty(shape)
            tensor = self._materialize(part, like.device, shape, factor)
        return tensor if tensor.dtype == like.dtype else tensor.to(like.dtype)

    @torch.compiler.disable
    def _materialize(self, part: str, device: torch.device, shape: tuple[int, ...], factor: float) -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            drawn = self._draw(part, torch.Size(shape).numel()).view(shape)
            tensor = (drawn if factor == 1.0 else drawn * factor).to(device)
        if device.type != "cpu":
            self._stored.pop((part, torch.device("cpu")), None)  # the model has moved: keep no second copy
        self._stored[part, device] = tensor
        return tensor

    @torch.compiler.disable
    def _draw(self, part: str, count: int, start: int = 0) -> torch.Tensor:
        return randomness.uniform(self.seed, (*self.stream, part), count, start, self.version)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stored": {}}  # copies and pickles regenerate the numbers

    def __repr__(self) -> str:
        stream = ", ".join(map(str, self.stream))
        return f"RandomBasis({stream}: {self.num_basis} x {self.size}, seed={self.seed})"


class _Product(torch.autograd.Function):
    """`scale * x @ basis` or its adjoint; each is the other's derivative. Nothing is saved for backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, basis: RandomBasis, adjoint: bool) -> torch.Tensor:
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
