"""Loss functions: value, residual, and vectors whose outer products make up the curvature in the outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F

from ...targets import IGNORED


def widened(outputs: torch.Tensor) -> torch.Tensor:
    """Returns outputs in single precision at least: sums of losses in half precision lose or overflow theirs."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


class Loss(ABC):
    """A convex function of a model's outputs, summed over places. Places without a target count nothing.

    Its second derivative in the outputs of a place is the sum of outer products of `c` vectors, one a label.
    """

    @abstractmethod
    def values(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Returns the losses of samples, summed over their places.

        Args:
            outputs: `(n, places, c)`.
            targets: `(n, places)`, -100 where there is none.

        Returns:
            Shape `(n,)`, in single precision at least.
        """

    @abstractmethod
    def hessian_product(self, outputs: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
        """Returns the second derivative in the outputs times a tangent, place by place.

        Args:
            outputs, tangent: `(n, places, c)`, as is the result.
        """

    @abstractmethod
    def label_weights(self, outputs: torch.Tensor) -> torch.Tensor:
        """Returns how often each label counts: the vector of label y is `sqrt(w_y)` times its direction.

        Args:
            outputs: `(places, c)`, as is the result.
        """

    @abstractmethod
    def directions(self, outputs: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
        """Returns m sums of the directions of all labels at every place.

        Args:
            outputs: `(places, c)`.
            amounts: how much of each direction is in each sum, `(places, m, c)`, as is the result.
        """

    @abstractmethod
    def squared_lengths(self, outputs: torch.Tensor) -> torch.Tensor:
        """Returns the squared lengths of the vectors of all labels.

        Args:
            outputs: `(places, c)`, as is the result.
        """

    def exact_probes(self, outputs: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """Returns the vectors of one sample, each at its place and zero at the others.

        Args:
            outputs: `(places, c)`.
            present: `(places,)`, 1 where there is a target and 0 elsewhere.

        Returns:
            Shape `(places * c, places, c)`.
        """
        places, c = outputs.shape
        amounts = self.label_weights(outputs).sqrt()[:, None] * torch.eye(c).to(outputs)
        return _spread(self.directions(outputs, amounts) * present[:, None, None])

    def sign_probes(
        self, outputs: torch.Tensor, present: torch.Tensor, u: torch.Tensor, draws: int, own: int = 1
    ) -> torch.Tensor:
        """Returns the vectors in groups, added up with random signs: the outer products are right in expectation.

        What errs are products of two vectors of a group. So a classifier's longest vectors, one place, have a group of
        their own and the rest shares one; the places of a language model are dealt out to the groups.

        Args:
            outputs: `(places, c)`.
            present: `(places,)`, 1 where there is a target and 0 elsewhere.
            u: uniform random numbers in [0, 1), `(places, c)`.
            draws: number of groups.
            own: how many of them a place has: all of them for a classifier of samples, and one for every place where
                there are several, or may be: a text must not be treated differently for having one.

        Returns:
            Shape `(draws, places, c)`.
        """
        c = outputs.shape[-1]
        signed = torch.where(u < 0.5, 1.0, -1.0).to(outputs) * self.label_weights(outputs).sqrt()
        longest = self.squared_lengths(outputs).topk(min(own - 1, c)).indices
        alone = F.one_hot(longest, c).to(outputs)
        amounts = torch.cat((alone, 1 - alone.sum(1, keepdim=True)), 1) * signed[:, None]
        vectors = self.directions(outputs, amounts) * present[:, None, None]
        first = ((present.cumsum(0).long() - 1).clamp(min=0) * own)[:, None]
        group = F.one_hot((first + torch.arange(vectors.shape[1]).to(first)) % draws, draws).to(outputs)
        return torch.einsum("pmd,pmc->dpc", group, vectors)

    @abstractmethod
    def label_probes(self, outputs: torch.Tensor, present: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Returns one vector a place, drawn by the weight of its label: the outer products are right in expectation.

        Args:
            outputs: `(places, c)`.
            present: `(places,)`, 1 where there is a target and 0 elsewhere.
            u: uniform random numbers in [0, 1), `(draws, places, 1)`.

        Returns:
            Shape `(draws, places, c)`, divided by the square root of the number of draws.
        """


class CrossEntropy(Loss):
    """Cross-entropy of the softmax: `-log p_y`.

    Its second derivative `diag(p) - p p^T` is the sum over labels y of `p_y (e_y - p)(e_y - p)^T`, the mean over labels
    drawn from the model: the Fisher matrix, which is the generalised Gauss-Newton matrix here (Martens, "New insights
    and perspectives on the natural gradient method", section 9).
    """

    def values(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        outputs = widened(outputs).transpose(1, 2)
        return F.cross_entropy(outputs, targets, ignore_index=IGNORED, reduction="none").sum(1)

    def hessian_product(self, outputs: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
        p = outputs.softmax(-1)
        return p * (tangent - (p * tangent).sum(-1, keepdim=True))

    def label_weights(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.softmax(-1)

    def directions(self, outputs: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
        return amounts - outputs.softmax(-1)[:, None] * amounts.sum(-1, keepdim=True)

    def squared_lengths(self, outputs: torch.Tensor) -> torch.Tensor:
        p = outputs.softmax(-1)
        return p * (1 - 2 * p + p.square().sum(-1, keepdim=True))

    def label_probes(self, outputs: torch.Tensor, present: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        p = outputs.softmax(-1)
        labels = (p.cumsum(-1) < u.to(p)).sum(-1).clamp(max=p.shape[-1] - 1)
        return (F.one_hot(labels, p.shape[-1]).to(p) - p) * (present[:, None] / len(u) ** 0.5)


class SquaredError(Loss):
    """Half the squared distance of the outputs from the one-hot target, as if a classifier were a regression."""

    def values(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        outputs = widened(outputs)
        present = (targets != IGNORED).to(outputs)
        wanted = F.one_hot(targets.clamp(min=0), outputs.shape[-1]).to(outputs)
        return 0.5 * ((outputs - wanted).square().sum(-1) * present).sum(1)

    def hessian_product(self, outputs: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
        return tangent

    def label_weights(self, outputs: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(outputs)

    def directions(self, outputs: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
        return amounts

    def squared_lengths(self, outputs: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(outputs)

    def label_probes(self, outputs: torch.Tensor, present: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        # A place gets one class, with a random sign.
        c = outputs.shape[-1]
        drawn = (u[..., 0] * 2 * c).long().clamp(max=2 * c - 1)
        sign = 1 - 2 * (drawn >= c).to(outputs)
        return F.one_hot(drawn % c, c).to(outputs) * (sign * present * (c / len(u)) ** 0.5)[..., None]


def _spread(one_place: torch.Tensor) -> torch.Tensor:
    """Returns `(places, m, c)` vectors, each at one place, as `(places * m, places, c)` vectors of all places."""
    places, m, c = one_place.shape
    where = torch.eye(places).to(one_place)
    return (where[:, None, :, None] * one_place[:, :, None, :]).reshape(places * m, places, c)


LOSSES: dict[str, type[Loss]] = {"cross_entropy": CrossEntropy, "squared_error": SquaredError}
