"""MCNC on a whole model."""

from __future__ import annotations

from typing import Any, ClassVar

from ..config import ELSEWHERE
from ..model import SeededModel
from .layer import McncConv2d, McncEmbedding, McncExperts, McncLayer, McncLinear

NOT_COMBINED = (
    "Coefficients of MCNC cannot be combined: a chunk of weights is beta * phi(alpha), and phi is not linear in alpha. "
    f"{ELSEWHERE}"
)
"""Why coefficients of several adapters cannot be added."""


class McncModel(SeededModel):
    """Adapts a model with MCNC; see [`McncConfig`].

    Made by `peft.get_peft_model(model, McncConfig(...))`.
    """

    tuner_layer_cls = McncLayer
    layer_classes: ClassVar = {
        "linear": McncLinear,
        "conv2d": McncConv2d,
        "embedding": McncEmbedding,
        "parameter": McncExperts,
    }

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raises a ValueError."""
        raise ValueError(NOT_COMBINED)
