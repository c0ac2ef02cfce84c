"""Transformer blocks with visual prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..coefficients import Coefficients
from ..provenance import CheckpointedLayer
from .config import VisualPromptConfig

NO_MERGE = (
    "Visual prompts are tokens in the input of the blocks: they cannot be merged into the weights. Keep the adapter to "
    "use them, or call `unload()` to get the base model back."
)


class VisualPromptLayer(CheckpointedLayer, nn.Module):
    """A block that gets prompts, passes on those of an earlier block, or cuts prompts off its output.

    A block of shape `(batch, tokens, hidden) -> (batch, tokens, hidden)` is called with the prompts at the end of the
    sequence. VPT puts them after the CLS token, which is the same: the blocks know no positions. At the end they leave
    every other token where the heads look for it, once the block that needs them last has cut them off.

    With several active adapters a block gets the prompts of all of them.
    """

    adapter_layer_names = ("visual_prompt_tokens",)
    other_param_names = (
        "visual_prompt_dropout",
        "visual_prompt_cut",
        *(f"visual_prompt_{name}" for name in CheckpointedLayer.record_names),
    )
    config_class = VisualPromptConfig

    def __init__(self, base_layer: nn.Module) -> None:
        nn.Module.__init__(self)
        self.make_records()
        self.base_layer = base_layer
        self.visual_prompt_tokens = Coefficients()
        self.visual_prompt_dropout = nn.ModuleDict()
        self.visual_prompt_cut: dict[str, int] = {}

    def update_layer(self, adapter_name: str, tokens: torch.Tensor | None, cut: int, dropout: float) -> None:
        """Adds an adapter to this block.

        Args:
            tokens: its prompts for this block, of shape `(num_prompts, hidden)`; `None` if the block gets none.
            cut: how many prompts of the adapter end with this block.
            dropout: dropout probability on the tokens.
        """
        # Every block knows every adapter, with or without tokens: when the active one is deleted, PEFT lets each
        # layer choose the next among those that it knows.
        self.visual_prompt_cut[adapter_name] = cut
        if tokens is not None:
            self.visual_prompt_dropout[adapter_name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
            device = next(self.base_layer.parameters()).device
            self.visual_prompt_tokens[adapter_name] = nn.Parameter(tokens.to(device))

    def container(self, adapter: str) -> Coefficients | None:
        return self.visual_prompt_tokens if adapter in self.visual_prompt_tokens else None

    def _get_available_adapters(self) -> set[str]:
        return set(self.visual_prompt_cut)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        active = [adapter for adapter in self.active_adapters if adapter in self.visual_prompt_cut]
        if self.disable_adapters or not active:
            return self.base_layer(hidden_states, *args, **kwargs)
        if any(mask is not None for mask in (*args, kwargs.get("attention_mask"))):
            raise ValueError(
                "`attention_mask` must be None with visual prompts, which it has no entries for. Use images of one "
                "size; with attn_implementation='flex_attention', which always makes a mask, use 'sdpa' instead."
            )
        # Prompts that go on to the next block come before those that end here.
        active.sort(key=lambda adapter: self.visual_prompt_cut[adapter] > 0)
        prompts = [self._prompts(adapter, hidden_states) for adapter in active if adapter in self.visual_prompt_tokens]
        output = self.base_layer(torch.cat([hidden_states, *prompts], dim=1), *args, **kwargs)
        cut = sum(self.visual_prompt_cut[adapter] for adapter in active)
        return output[:, :-cut] if cut else output

    def _prompts(self, adapter: str, hidden_states: torch.Tensor) -> torch.Tensor:
        """Shape `(batch, num_prompts, hidden)`, in the dtype and on the device of the hidden states."""
        self.provenances[adapter].settle()
        tokens = self.visual_prompt_tokens[adapter].to(hidden_states)
        return self.visual_prompt_dropout[adapter](tokens.expand(hidden_states.shape[0], -1, -1))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises a ValueError."""
        raise ValueError(NO_MERGE)

    def unmerge(self) -> None:
        """Raises a ValueError."""
        raise ValueError(NO_MERGE)

    def __repr__(self) -> str:
        return f"visual_prompt.{super().__repr__()}"
