"""Visual prompt tuning on a whole model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ... import randomness
from ...checkpoint.identity import Identity, check_identity
from ..checkpointed import CheckpointedModel
from ..limits import check_multiple
from ..model import base_layer_of
from ..target import Target
from .config import VisualPromptConfig
from .layer import NO_MERGE, VisualPromptLayer

MODEL_TYPES = ("vit", "deit", "dinov2", "dinov2_with_registers")
"""Architectures whose positions are added before the first block, so that the place of a prompt does not matter."""


class VisualPromptModel(CheckpointedModel):
    """Adapts a vision transformer with visual prompts; see [`VisualPromptConfig`].

    Made by `peft.get_peft_model(model, VisualPromptConfig(...))`. `last_hidden_state` and the outputs of a head have
    the shapes that they have without prompts. `hidden_states` and `attentions` are those of the blocks, with the
    prompts after the `n` tokens of the image: `hidden_states[i][:, :n]` leaves them out.
    """

    prefix = "visual_prompt_"
    tuner_layer_cls = VisualPromptLayer

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        # The configuration says which blocks are adapted; a state dict names those with tokens alone.
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Finds the blocks before PEFT replaces the first.

        Raises:
            ValueError: the architecture cannot have prompts.
        """
        self._blocks = {name: index for index, name in enumerate(_blocks(model))}
        targets = [
            Target(name, peft_config.num_prompts, model.config.hidden_size)  # type: ignore[arg-type, union-attr]
            for name, index in self._blocks.items()
            if peft_config.deep or index == 0
        ]
        if peft_config.identity is not None:
            identity = Identity(peft_config.generating(), [peft_config.described(target) for target in targets])
            check_identity(peft_config.identity, identity, "in adapter_config.json")
        height, width = _pair(model.config.image_size)  # type: ignore[union-attr, arg-type]
        patch = _pair(model.config.patch_size)  # type: ignore[union-attr, arg-type]
        check_multiple("num_prompts", peft_config.num_prompts, height // patch[0] * (width // patch[1]), "patches")
        self._targets = {target.name: target for target in targets}

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:  # type: ignore[override]
        return key in self._blocks

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        index = self._blocks[current_key]
        ends = peft_config.deep or index == len(self._blocks) - 1
        layer = target if isinstance(target, VisualPromptLayer) else VisualPromptLayer(target)
        layer.update_layer(
            adapter_name,
            _initial_tokens(peft_config, self.model.config, index) if peft_config.deep or index == 0 else None,
            incoming=peft_config.num_prompts if index > 0 and not peft_config.deep else 0,
            cut=peft_config.num_prompts if ends else 0,
            dropout=peft_config.prompt_dropout,
        )
        if current_key in self._targets:
            self._record(peft_config, adapter_name, layer, self._targets[current_key])
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT also copies a weight and a bias, which blocks do not have

    def _check_merge_allowed(self) -> None:
        raise ValueError(NO_MERGE)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raises a ValueError."""
        raise ValueError(
            "Visual prompts cannot be combined with weights: they are tokens that the blocks attend to, not updates "
            "that add. Activate several adapters with `base_model.set_adapter([...])` to use the prompts of all."
        )


def _blocks(model: nn.Module) -> list[str]:
    """Names of the transformer blocks of a model, adapted before or not, in their order."""
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"Visual prompts need a model of type {', '.join(MODEL_TYPES)}, whose blocks know no positions, got "
            f"{type(model).__name__} of type {model_type!r}. For other architectures use another method of PEFT."
        )
    if hasattr(model, "out_features"):
        raise ValueError(
            f"Visual prompts cannot be used in a backbone for feature maps, got {type(model).__name__}: it makes the "
            "maps of hidden states, which hold the prompts too. Use AutoModel or a model with a head."
        )
    found = [
        [f"{name}.{index}" for index in range(len(module))]
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == config.num_hidden_layers  # type: ignore[union-attr]
        and all(isinstance(base_layer_of(block), GradientCheckpointingLayer) for block in module)
    ]
    if len(found) != 1:
        raise ValueError(
            f"Visual prompts need the {config.num_hidden_layers} blocks of the model in one list, found "  # type: ignore[union-attr]
            f"{len(found)} such lists in {type(model).__name__}."
        )
    return found[0]


def _initial_tokens(config: VisualPromptConfig, model_config: Any, block: int) -> torch.Tensor:
    """Uniform with the variance that a Glorot initialisation of the patch embedding has: `(num_prompts, hidden)`."""
    hidden = model_config.hidden_size
    height, width = _pair(model_config.patch_size)
    bound = math.sqrt(6 / (model_config.num_channels * height * width + hidden))
    numbers = randomness.uniform(config.seed, ("visual_prompt", block), config.num_prompts * hidden)
    return numbers.mul_(bound).view(config.num_prompts, hidden)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
