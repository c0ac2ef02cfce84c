"""Gradient difference: ascent on the forget set, descent on the retain set (Liu et al., "Continual Learning and Private
Unlearning", 2022; Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs", 2024, section 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ...checks import check_positive
from .base import Request
from .paired import Paired, log_probabilities
from .relabelling import count_classes


@dataclass
class GradDiff(Paired):
    """Ascends the loss of the forget set and descends that of the retain set.

    The ascent has no end of its own: the published form goes on for as long as it is trained. Here a forget batch whose
    loss has reached a bound is left alone, while the retain set goes on.

    Attributes:
        max_loss: the bound, a mean over the batch's targets in nats; if None, the loss of a guess among all classes (or
            tokens), the logarithm of their number.
    """

    name: ClassVar[str] = "grad_diff"
    max_loss: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_loss is not None:
            check_positive("max_loss", self.max_loss)

    def before(self, request: Request, parts: Mapping[str, Any]) -> float:
        return math.log(count_classes(request)) if self.max_loss is None else self.max_loss

    def forget_loss(self, model: nn.Module, batch: Mapping[str, Any], before: float) -> torch.Tensor:
        found, targets = log_probabilities(model, batch["forget"])
        return -(-found.sum() / targets.sum().clamp(min=1)).clamp(max=before)
