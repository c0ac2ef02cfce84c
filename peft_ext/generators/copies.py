"""Many parts from one basis."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .. import randomness
from .base import Frozen
from .linear import LinearGenerator, RandomBasis


@dataclass(frozen=True, repr=False)
class SignedCopies(LinearGenerator):
    """Several parts, each from the same coefficients and the same random basis, with random signs of its own.

    Part `e` is `(signs[e] * coefficients) @ basis`, perhaps with a constant offset. So the experts of a layer take the
    memory of one basis, whatever their number. The vectors of the whole, which hold those of the basis one below the
    other with different signs, are random like those of a basis of their own, and nearer to orthogonal the more parts
    there are; what is given up is that every part lies in the span of one and the same `num_coefficients` matrices.

    Sign `(e, i)` is -1 where number `e * num_coefficients + i` of the seed's stream `(*stream, "sign")` is below 0,
    otherwise +1; `stream` is that of the basis. The offset is the start of the stream `(*stream, "offset")`.

    Args:
        basis: of one part, without an offset.
        copies: number of parts.
        offset_scale: factor on the offset; 0 for none.
    """

    basis: RandomBasis
    copies: int
    offset_scale: float = 0.0
    _signs: Frozen = field(init=False, compare=False)
    _offset: Frozen = field(init=False, compare=False)

    def __post_init__(self) -> None:
        basis = self.basis
        signs = (_signs, basis.seed, basis.stream, self.copies, basis.num_basis, basis.version)
        object.__setattr__(self, "_signs", Frozen.shared(*signs))
        self._keep_offset(basis.seed, basis.stream, basis.version)

    @property
    def num_coefficients(self) -> int:  # type: ignore[override]
        return self.basis.num_basis

    @property
    def size(self) -> int:  # type: ignore[override]
        return self.copies * self.basis.size

    @property
    def streamed(self) -> bool:  # type: ignore[override]
        return self.basis.streamed

    @property
    def frozen(self) -> tuple[Frozen, ...]:
        keeps_offset = bool(self.offset_scale) and not self.streamed
        return (*self.basis.frozen, self._signs, *((self._offset,) if keeps_offset else ()))

    @property
    def frozen_sizes(self) -> tuple[int, ...]:
        sizes = (*self.basis.frozen_sizes, self.copies * self.num_coefficients, self.size)
        return sizes[: len(self.frozen)]

    def _product(self, x: torch.Tensor, adjoint: bool) -> torch.Tensor:
        signs = self._signs.like(x)
        if adjoint:
            parts = x.reshape(*x.shape[:-1], self.copies, self.basis.size)
            return (self.basis._product(parts, adjoint=True) * signs).sum(-2)
        return self.basis._product(x[..., None, :] * signs, adjoint=False).flatten(-2)

    def __repr__(self) -> str:
        return f"SignedCopies({self.copies} of {self.basis!r})"


def _signs(seed: int, stream: tuple[str | int, ...], copies: int, num_coefficients: int, version: int) -> torch.Tensor:
    numbers = randomness.uniform(seed, (*stream, "sign"), copies * num_coefficients, 0, version)
    return torch.where(numbers < 0, -1.0, 1.0).view(copies, num_coefficients)
