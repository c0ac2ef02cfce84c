"""Training that leaves some directions alone: updates are projected away from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..checks import check_positive_integer, check_share

_ROUNDING = 1e-12


class Projection:
    """Projects vectors away from the directions that hold most of the energy of a positive semi-definite matrix.

    Gradient projection memory (Saha et al. 2021) keeps what earlier tasks need by it, and CovarNav what is not to be
    forgotten. The directions are the leading eigenvectors of `R^T R`, as many as hold the share of its trace. Beside
    another projection they are those of what that leaves of `R^T R`, and the share counts what it holds already.

    Args:
        matrix: the rows R, `(m, size)`, or with `symmetric` the matrix itself, `(size, size)`.
        energy: share of the trace that is protected, above 0 and at most 1; 1 protects all that the rows span.
        symmetric: whether `matrix` is `R^T R`.
        components: at most as many directions are added, whatever share of the trace they hold. By default there is no
            such bound.
        beside: a projection whose directions are protected too.

    Attributes:
        basis: the protected directions, orthonormal, `(size, directions)` in float64.

    Raises:
        ValueError: `energy` or `components` is something else, the matrix is zero or not finite, or nothing but
            rounding is left of a vector: all directions are protected.
    """

    basis: torch.Tensor

    def __init__(
        self,
        matrix: torch.Tensor,
        energy: float,
        symmetric: bool = False,
        components: int | None = None,
        beside: Projection | None = None,
    ) -> None:
        check_share("energy", energy)
        matrix, size = matrix.double(), matrix.shape[1]
        if not torch.isfinite(matrix).all() or not matrix.any():
            raise ValueError("There is nothing to protect: the matrix of what to keep is zero or not finite.")
        if components is not None:
            check_positive_integer("components", components)
            if components >= size:
                raise ValueError(f"`components` must be less than the {size:,} numbers of a vector, got {components}.")
        whole = matrix.trace() if symmetric else matrix.square().sum()
        known = matrix.new_zeros(size, 0) if beside is None else beside.basis.to(matrix)
        if beside is not None:
            matrix = matrix - matrix @ known @ known.T
            matrix = matrix - known @ (known.T @ matrix) if symmetric else matrix
        # Of few rows the small matrix is decomposed.
        small = not symmetric and matrix.shape[0] < size
        gram = matrix if symmetric else matrix @ matrix.T if small else matrix.T @ matrix
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        # The share of the trace that is protected with 0, 1, 2, ... of the directions.
        reached = 1 - (values.sum() - torch.cat((values.new_zeros(1), values.cumsum(0)))) / whole
        count = int((reached < energy - _ROUNDING).sum())
        count = min(count, size if components is None else components, int((values > _ROUNDING * whole).sum()))
        if known.shape[1] + count == size:
            raise ValueError(
                f"All {size:,} directions would be protected, and nothing could change: lower `energy`, of which "
                f"{energy:g} is asked for, or `components`."
            )
        kept = vectors[:, :count]
        added = matrix.T @ kept / values[:count].sqrt() if small else kept
        if beside is not None and count:  # without what rounding has left of the known ones
            added = torch.linalg.qr(added - known @ (known.T @ added)).Q
        self.basis = torch.cat((known, added), 1)

    def __call__(self, vector: torch.Tensor) -> torch.Tensor:
        """Returns what of a vector `(size,)` lies outside the protected directions."""
        return vector - self.basis @ (self.basis.T @ vector)


class ProjectUpdates(TrainerCallback):
    """Projects what an optimizer does to parameters, at every step.

    Projected gradients are not enough: an optimizer that scales every coordinate by itself, such as Adam, moves them
    out of the space that they were projected on, and so do weight decay and momentum from before.

    Args:
        parameters: the trainable parameters, by name, in the order of the vectors that are projected.
        projection: the projection of all of them as one vector.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], projection: Projection) -> None:
        self.parameters = list(parameters.values())
        self.projection = projection
        self.before = self._vector()
        size = projection.basis.shape[0]
        if size != len(self.before):
            raise ValueError(f"The projection is one of {size:,} numbers; {len(self.before):,} are trained.")

    def _vector(self) -> torch.Tensor:
        parts = [parameter.detach().double().flatten() for parameter in self.parameters]
        return torch.cat([part.to(self.projection.basis.device) for part in parts])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = self._vector()

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        allowed = self.before + self.projection(self._vector() - self.before)
        parts = allowed.split([parameter.numel() for parameter in self.parameters])
        for parameter, part in zip(self.parameters, parts):
            parameter.copy_(part.view(parameter.shape))
