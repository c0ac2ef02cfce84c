"""Updates of weights as products of two factors: exactly, or cut off where the singular values say."""

from __future__ import annotations

import torch

from ..tuners.layers import Update


class LowRank:
    """An update `M` of a weight as a sum of products `B A`, a product for every group of a convolution.

    A dense update is cut off behind its largest singular values, which gives the smallest possible error of a rank
    (Eckart and Young, 1936). Factors stay as they are.

    Args:
        update: of shape `(fan_out, fan_in)`, or factors A `(r, fan_in)` and B `(fan_out, r)`.
        groups: the rows are cut into so many groups of equal size, each with factors of its own.
    """

    def __init__(self, update: Update, groups: int = 1) -> None:
        self.groups = groups
        self.is_exact = isinstance(update, tuple)
        if isinstance(update, tuple):
            A, B = (factor.detach().float().cpu() for factor in update)
            self._A, self._B = A.expand(groups, *A.shape), B.view(groups, -1, B.shape[1])
            self.full_rank = len(A)
            return
        self._M = update.detach().float().cpu()
        self._M = self._M.reshape(groups, -1, self._M.shape[1])
        self.full_rank = min(self._M.shape[1:])

    def rank_for(self, error: float) -> int:
        """The smallest rank of a group with which the norm of what is cut off is at most `error` times that of `M`."""
        if self.is_exact or error == 0:
            return self.full_rank
        squares = self._singular()[1].double().square().sum(0)
        tails = squares.flip(0).cumsum(0).flip(0)  # entry r: what is lost with rank r
        enough = tails <= error**2 * squares.sum()
        return max(1, int(enough.nonzero()[0]) if enough.any() else self.full_rank)

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A `(groups, rank, fan_in)` and B `(groups, fan_out / groups, rank)` in float32.

        What a dense update of full rank needs no singular values for is exact. Ranks beyond the full one are zeros.
        """
        if self.is_exact:
            A, B = self._A, self._B
        elif rank >= self.full_rank:
            _, rows, columns = self._M.shape
            eye = torch.eye(self.full_rank).expand(self.groups, -1, -1)
            A, B = (self._M, eye) if rows <= columns else (eye, self._M)
        else:
            U, S, V = self._singular()
            root = S[:, :rank].sqrt()
            A, B = root[:, :, None] * V[:, :rank], U[:, :, :rank] * root[:, None]
        missing = rank - A.shape[1]
        return torch.nn.functional.pad(A, (0, 0, 0, missing)), torch.nn.functional.pad(B, (0, missing))

    def norms(self, A: torch.Tensor, B: torch.Tensor) -> tuple[float, float]:
        """The squared norms of what the factors of a dense update do not give of it, and of the update."""
        M = self._M.double()
        return float((B.double() @ A.double() - M).square().sum()), float(M.square().sum())

    def _singular(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not hasattr(self, "_svd"):
            self._svd = torch.linalg.svd(self._M, full_matrices=False)
        return self._svd
