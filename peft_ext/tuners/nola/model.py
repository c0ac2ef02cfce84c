"""NOLA on a whole model."""

from __future__ import annotations

from typing import ClassVar

from ..model import SeededModel
from .layer import NolaConv2d, NolaEmbedding, NolaExperts, NolaLayer, NolaLinear


class NolaModel(SeededModel):
    """Adapts a model with NOLA; see [`NolaConfig`].

    Made by `peft.get_peft_model(model, NolaConfig(...))`.
    """

    tuner_layer_cls = NolaLayer
    layer_classes: ClassVar = {
        "linear": NolaLinear,
        "conv2d": NolaConv2d,
        "embedding": NolaEmbedding,
        "parameter": NolaExperts,
    }
