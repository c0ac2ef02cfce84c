"""Three forms of one positive semi-definite matrix, each with products and damped solutions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

CG_TOLERANCE = 1e-4
CG_STEPS = 200


class Curvature(ABC):
    """A positive semi-definite matrix G of `size x size` in float64.

    Attributes:
        mean: the mean of its diagonal.
    """

    mean: float

    @abstractmethod
    def product(self, vector: torch.Tensor) -> torch.Tensor:
        """Returns `G v`."""

    @abstractmethod
    def solve(self, vector: torch.Tensor, shift: float) -> torch.Tensor:
        """Returns `(G + shift I)^-1 v`.

        Args:
            vector: v, `(size,)` or, except in matrix-free form, `(size, n)`.
            shift: what is added to the diagonal.

        Raises:
            ValueError: the sum is not positive definite in float64.
        """


class ParameterForm(Curvature):
    """G itself: memory O(p^2), whatever number of samples it was added up from.

    Args:
        gram: `(p, p)`.
    """

    def __init__(self, gram: torch.Tensor) -> None:
        self.gram = gram
        self.mean = float(gram.diagonal().mean())

    @staticmethod
    def bytes_needed(size: int) -> int:
        return 3 * 8 * size**2  # G, what is added to it or factorised, and the factor

    def product(self, vector: torch.Tensor) -> torch.Tensor:
        return self.gram @ vector

    def solve(self, vector: torch.Tensor, shift: float) -> torch.Tensor:
        return _solve(self.gram, vector, shift)


class KernelForm(Curvature):
    """`R^T R`, kept as the rows R: memory O(n (n + p)) for n rows.

    Args:
        rows: `(n, p)`.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows
        self.kernel = rows @ rows.T
        self.mean = float(self.kernel.trace()) / rows.shape[1]

    @staticmethod
    def bytes_needed(rows: int, size: int) -> int:
        return 8 * (2 * rows * size + 3 * rows**2)

    def product(self, vector: torch.Tensor) -> torch.Tensor:
        return self.rows.T @ (self.rows @ vector)

    def solve(self, vector: torch.Tensor, shift: float) -> torch.Tensor:
        # Woodbury's identity.
        return (vector - self.rows.T @ _solve(self.kernel, self.rows @ vector, shift)) / shift


class MatrixFreeForm(Curvature):
    """G by its products alone: memory O(p). Solutions by conjugate gradients, to a relative residual of 1e-4.

    Args:
        product: `v -> G v`.
        mean: the mean of the diagonal.
    """

    def __init__(self, product: Callable[[torch.Tensor], torch.Tensor], mean: float) -> None:
        self._product = product
        self.mean = mean

    def product(self, vector: torch.Tensor) -> torch.Tensor:
        return self._product(vector)

    def solve(self, vector: torch.Tensor, shift: float) -> torch.Tensor:
        solution = torch.zeros_like(vector)
        residual = vector.clone()
        direction = residual.clone()
        squared = residual.square().sum()
        target = CG_TOLERANCE**2 * squared
        for _ in range(CG_STEPS):
            if squared <= target:
                break
            image = self._product(direction) + shift * direction
            step = squared / (direction * image).sum()
            solution += step * direction
            residual -= step * image
            before, squared = squared, residual.square().sum()
            direction = residual + (squared / before) * direction
        return solution


def _solve(matrix: torch.Tensor, vector: torch.Tensor, shift: float) -> torch.Tensor:
    shifted = matrix.clone()
    shifted.diagonal().add_(shift)
    factor, info = torch.linalg.cholesky_ex(shifted)
    if int(info) != 0:
        raise ValueError(
            f"The curvature with {shift:.3g} on its diagonal is not positive definite in float64: raise `damping`."
        )
    columns = vector[:, None] if vector.dim() == 1 else vector
    return torch.cholesky_solve(columns, factor).view(vector.shape)
