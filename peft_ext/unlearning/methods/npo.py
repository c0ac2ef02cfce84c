"""Negative preference optimization (Zhang et al., "Negative Preference Optimization: From Catastrophic Collapse to
Effective Unlearning", 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ...checks import check_positive
from .base import Request
from .paired import Paired, log_probabilities, reference_log_probabilities


@dataclass
class NPO(Paired):
    """Makes forget samples less likely than they were, the less the further they have come (equation 3 of the paper).

    The loss of a sample is `2 / beta * log(1 + (p / p_trained)^beta)`, where p is the probability of all its targets
    together. The trained model is asked once for every sample, before the first step; no second model is kept.

    Attributes:
        beta: how soon a sample is left alone; towards 0 this becomes gradient ascent.
    """

    name: ClassVar[str] = "npo"
    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("beta", self.beta)

    def before(self, request: Request, parts: Mapping[str, Any]) -> torch.Tensor:
        return reference_log_probabilities(request, parts["forget"])

    def forget_loss(self, model: nn.Module, batch: Mapping[str, Any], before: torch.Tensor) -> torch.Tensor:
        found, _ = log_probabilities(model, batch["forget"])
        return 2 / self.beta * F.softplus(self.beta * (found - before[batch["place"]])).mean()
