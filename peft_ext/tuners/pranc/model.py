"""PRANC on a whole model."""

from __future__ import annotations

from typing import Any, ClassVar

from ..model import SeededModel
from .layer import PrancConv2d, PrancEmbedding, PrancExperts, PrancLayer, PrancLinear, PrancVector


class PrancModel(SeededModel):
    """Adapts a model with PRANC; see [`PrancConfig`].

    Made by `peft.get_peft_model(model, PrancConfig(...))`.
    """

    tuner_layer_cls = PrancLayer
    layer_classes: ClassVar = {
        "linear": PrancLinear,
        "conv2d": PrancConv2d,
        "embedding": PrancEmbedding,
        "parameter": PrancExperts,
        "vector": PrancVector,
    }

    def adaptable_kinds(self, peft_config: Any) -> list[str]:
        return [kind for kind in super().adaptable_kinds(peft_config) if kind != "vector" or not peft_config.on_factors]

    def inject_adapter(self, *args: Any, state_dict: Any = None, **kwargs: Any) -> None:
        if state_dict is not None:
            raise ValueError(
                "`state_dict` must be None for PRANC: the one vector of an adapter does not say which layers read it. "
                "Give the configuration with its `target_modules` instead."
            )
        super().inject_adapter(*args, **kwargs)
