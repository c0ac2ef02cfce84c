"""Loss functions: value, residual, and vectors whose outer products make up the curvature in the outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F

IGNORED = -100  # a target that is none, as everywhere in transformers


def outputs_and_targets(outputs: Any, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model says at every place that has a target.

    A classifier has one place a sample. A causal language model has one before every token but the first.

    Args:
        outputs: of the model, with `logits` of shape `(n, c)`, or `(n, length, c)` of a language model.
        labels: `(n,)`, or `(n, length)`.

    Returns:
        Outputs of shape `(n, places, c)` and targets of shape `(n, places)`.

    Raises:
        ValueError: other shapes.
    """
    logits = outputs.logits if hasattr(outputs, "logits") else outputs
    if logits.dim() == 2 and labels.dim() == 1:
        return logits[:, None], labels[:, None]
    if logits.dim() == 3 and labels.dim() == 2:
        # A soft prompt has outputs too, which nobody labelled.
        return logits[:, logits.shape[1] - labels.shape[1] : -1], labels[:, 1:]
    raise ValueError(
        "The model must give logits of shape (n, classes) for labels of shape (n,), or (n, length, vocabulary) for "
        f"(n, length), got {tuple(logits.shape)} for {tuple(labels.shape)}."
    )


class Loss(ABC):
    """A convex function of a model's outputs, summed over places. Places without a target count nothing."""

    @abstractmethod
    def values(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The losses of samples, summed over their places: `(n,)` of `(n, places, c)` and `(n, places)`."""

    @abstractmethod
    def hessian_product(self, outputs: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
        """The second derivative in the outputs times a tangent, place by place; both `(n, places, c)`."""

    @abstractmethod
    def exact_probes(self, outputs: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """Vectors whose outer products add up to the second derivative in the outputs of one sample.

        Args:
            outputs: `(places, c)`.
            present: `(places,)`, 1 where there is a target and 0 elsewhere.

        Returns:
            Shape `(places * c, places, c)`.
        """

    @abstractmethod
    def sign_probes(self, outputs: torch.Tensor, present: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Sums of all those vectors with random signs: their outer product is that derivative in expectation.

        Args:
            outputs: `(places, c)`.
            present: `(places,)`.
            u: uniform random numbers in [0, 1), `(draws, places, c)`.

        Returns:
            Shape `(draws, places, c)`, divided by the square root of the number of draws.
        """

    @abstractmethod
    def label_probes(self, outputs: torch.Tensor, present: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """One of those vectors a place, drawn by its weight: likewise.

        Args:
            outputs: `(places, c)`.
            present: `(places,)`.
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
        return F.cross_entropy(outputs.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none").sum(1)

    def hessian_product(self, outputs: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
        p = outputs.softmax(-1)
        return p * (tangent - (p * tangent).sum(-1, keepdim=True))

    def exact_probes(self, outputs: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        places, c = outputs.shape
        p = outputs.softmax(-1)
        one_place = p.sqrt()[..., None] * (torch.eye(c).to(p) - p[:, None])  # (places, label, c)
        return _spread(one_place * present[:, None, None])

    def sign_probes(self, outputs: torch.Tensor, present: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        p = outputs.softmax(-1)
        signed = torch.where(u < 0.5, p.sqrt(), -p.sqrt())
        return (signed - p * signed.sum(-1, keepdim=True)) * (present[:, None] / len(u) ** 0.5)

    def label_probes(self, outputs: torch.Tensor, present: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        p = outputs.softmax(-1)
        labels = (p.cumsum(-1) < u.to(p)).sum(-1).clamp(max=p.shape[-1] - 1)
        return (F.one_hot(labels, p.shape[-1]).to(p) - p) * (present[:, None] / len(u) ** 0.5)


class SquaredError(Loss):
    """Half the squared distance of the outputs from the one-hot target, as if a classifier were a regression."""

    def values(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        present = (targets != IGNORED).to(outputs)
        wanted = F.one_hot(targets.clamp(min=0), outputs.shape[-1]).to(outputs)
        return 0.5 * ((outputs - wanted).square().sum(-1) * present).sum(1)

    def hessian_product(self, outputs: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
        return tangent

    def exact_probes(self, outputs: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        places, c = outputs.shape
        return _spread(torch.eye(c).to(outputs) * present[:, None, None])

    def sign_probes(self, outputs: torch.Tensor, present: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.where(u < 0.5, 1.0, -1.0).to(outputs) * (present[:, None] / len(u) ** 0.5)

    def label_probes(self, outputs: torch.Tensor, present: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        # One class a place, with a random sign.
        c = outputs.shape[-1]
        drawn = (u[..., 0] * 2 * c).long().clamp(max=2 * c - 1)
        sign = 1 - 2 * (drawn >= c).to(outputs)
        return F.one_hot(drawn % c, c).to(outputs) * (sign * present * (c / len(u)) ** 0.5)[..., None]


def _spread(one_place: torch.Tensor) -> torch.Tensor:
    """`(places, m, c)` vectors, each at one place, as `(places * m, places, c)` vectors of all places."""
    places, m, c = one_place.shape
    where = torch.eye(places).to(one_place)
    return (where[:, None, :, None] * one_place[:, :, None, :]).reshape(places * m, places, c)


LOSSES: dict[str, type[Loss]] = {"cross_entropy": CrossEntropy, "squared_error": SquaredError}
