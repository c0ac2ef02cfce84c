"""Negative preference optimization without a reference (Fan et al., "Simplicity Prevails: Rethinking Negative
Preference Optimization for LLM Unlearning", 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ...checks import check_not_negative, check_positive
from .paired import Paired, log_probabilities


@dataclass
class SimNPO(Paired):
    """Makes forget samples unlikely, by the mean log-probability of their targets (section 4 of the paper).

    The loss of a sample is `2 / beta * log(1 + exp(beta * m + gamma))`, where m is that mean.

    Attributes:
        beta: how soon a sample is left alone.
        gamma: the margin: a sample is left alone once m is well below `-gamma / beta`. The released code subtracts its
            margin before it multiplies by beta; its margin is this one divided by beta.
    """

    name: ClassVar[str] = "simnpo"
    beta: float = 2.5
    gamma: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("beta", self.beta)
        check_not_negative("gamma", self.gamma)

    def forget_loss(self, model: nn.Module, batch: Mapping[str, Any], before: Any) -> torch.Tensor:
        found, targets = log_probabilities(model, batch["forget"])
        mean = found / targets.clamp(min=1)
        return 2 / self.beta * F.softplus(self.beta * mean + self.gamma).mean()
