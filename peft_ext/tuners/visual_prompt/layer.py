"""Transformer blocks with visual prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..coefficients import Coefficients
from ..mixed import MixedBatch
from ..provenance import CheckpointedLayer
from .config import VisualPromptConfig

NO_MERGE = (
    "Visual prompts are tokens in the input of the blocks: they cannot be merged into the weights. Keep the adapter to "
    "use them, or call `unload()` to get the base model back."
)

NO_SCALE = (
    "Visual prompts are tokens in the input of the blocks: they cannot be scaled, as updates of weights can. Their "
    "scale must be 1, got {}."
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
        "visual_prompt_incoming",
        *(f"visual_prompt_{name}" for name in CheckpointedLayer.record_names),
    )
    config_class = VisualPromptConfig
    mixed: MixedBatch | None = None

    def __init__(self, base_layer: nn.Module) -> None:
        nn.Module.__init__(self)
        self.make_records()
        self.base_layer = base_layer
        self.visual_prompt_tokens = Coefficients()
        self.visual_prompt_dropout = nn.ModuleDict()
        self.visual_prompt_cut: dict[str, int] = {}
        self.visual_prompt_incoming: dict[str, int] = {}

    def update_layer(
        self, adapter_name: str, tokens: torch.Tensor | None, incoming: int, cut: int, dropout: float
    ) -> None:
        """Adds an adapter to this block.

        Args:
            tokens: its prompts for this block, of shape `(num_prompts, hidden)`; `None` if the block gets none.
            incoming: how many prompts of the adapter come from the block before.
            cut: how many prompts of the adapter end with this block.
            dropout: dropout probability on the tokens.
        """
        # Every block knows every adapter, with or without tokens: when the active one is deleted, PEFT lets each
        # layer choose the next among those that it knows.
        self.visual_prompt_cut[adapter_name] = cut
        self.visual_prompt_incoming[adapter_name] = incoming
        if tokens is not None:
            self.visual_prompt_dropout[adapter_name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
            device = next(self.base_layer.parameters()).device
            self.visual_prompt_tokens[adapter_name] = nn.Parameter(tokens.to(device))

    def container(self, adapter: str) -> Coefficients | None:
        return self.visual_prompt_tokens if adapter in self.visual_prompt_tokens else None

    def _get_available_adapters(self) -> set[str]:
        return set(self.visual_prompt_cut)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.mixed is not None:
            self.mixed.check(hidden_states)
            if not self.disable_adapters:
                return self._mixed(self.mixed, hidden_states, *args, **kwargs)
        active = [adapter for adapter in self.active_adapters if adapter in self.visual_prompt_cut]
        if self.disable_adapters or not active:
            return self.base_layer(hidden_states, *args, **kwargs)
        # Prompts that go on to the next block come before those that end here.
        active.sort(key=lambda adapter: self.visual_prompt_cut[adapter] > 0)
        prompts = [self._prompts(adapter, hidden_states) for adapter in active if adapter in self.visual_prompt_tokens]
        hidden_states = torch.cat([hidden_states, *prompts], dim=1)
        args = tuple(_with_room(mask, hidden_states.shape[1]) for mask in args)
        if "attention_mask" in kwargs:
            kwargs["attention_mask"] = _with_room(kwargs["attention_mask"], hidden_states.shape[1])
        output = self.base_layer(hidden_states, *args, **kwargs)
        cut = sum(self.visual_prompt_cut[adapter] for adapter in active)
        return output[:, :-cut] if cut else output

    def _mixed(self, batch: MixedBatch, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The output for rows that have adapters of their own.

        The block is called once for all rows of one length. From block to block all rows are as long as the longest:
        zeros, which no block sees, follow the tokens of the others.
        """
        _refuse_mask(*args, kwargs.get("attention_mask"))
        names = list(dict.fromkeys(batch.names))
        incoming = {name: self.visual_prompt_incoming.get(name, 0) for name in names}
        image = hidden_states.shape[1] - max(incoming.values())
        inputs: dict[int, list[torch.Tensor]] = {}  # by length
        places: dict[int, list[tuple[list[int], int]]] = {}  # rows, and how many tokens end here
        for name in names:
            rows = [row for row, each in enumerate(batch.names) if each == name]
            own = hidden_states[rows, : image + incoming[name]]
            if name in self.visual_prompt_tokens:
                own = torch.cat([own, self._prompts(name, own)], dim=1)
            inputs.setdefault(own.shape[1], []).append(own)
            places.setdefault(own.shape[1], []).append((rows, self.visual_prompt_cut.get(name, 0)))
        outputs: list[tuple[list[int], torch.Tensor]] = []
        for length, parts in inputs.items():
            output = self.base_layer(torch.cat(parts), *args, **kwargs).split([len(part) for part in parts])
            for (rows, cut), each in zip(places[length], output):
                outputs.append((rows, each[:, : length - cut]))
        longest = max(each.shape[1] for _, each in outputs)
        padded = [nn.functional.pad(each, (0, 0, 0, longest - each.shape[1])) for _, each in outputs]
        order = torch.tensor([row for rows, _ in outputs for row in rows], device=hidden_states.device)
        return torch.cat(padded)[order.argsort()]

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

    def set_scale(self, adapter: str, scale: float) -> None:
        """Raises a ValueError unless the scale is 1."""
        self.scale_layer(scale)

    def scale_layer(self, scale: float) -> None:
        """Raises a ValueError unless the scale is 1."""
        if scale != 1:
            raise ValueError(NO_SCALE.format(scale))

    def unscale_layer(self, scale: float | None = None) -> None:
        """Raises a ValueError unless the scale is 1 or None."""
        self.scale_layer(1 if scale is None else scale)

    def __repr__(self) -> str:
        return f"visual_prompt.{super().__repr__()}"


def _with_room(mask: Any, length: int) -> Any:
    """A mask with entries for the prompts, which every token sees; they see what any token sees.

    (With a padded batch, or when a program is exported: transformers leaves the mask out otherwise.)

    Args:
        mask: of shape `(batch or 1, heads or 1, tokens or 1, tokens)`, True or 0 where a token is seen; or `None`.
        length: number of tokens with the prompts.
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        raise ValueError(
            f"`attention_mask` must be a tensor of four dimensions in the blocks, for visual prompts, got a "
            f"{type(mask).__name__}. With attn_implementation='flex_attention' use 'sdpa' instead."
        )
    missing = length - mask.shape[-1]
    if mask.shape[-2] > 1:
        seen = mask.any(-2, keepdim=True) if mask.dtype == torch.bool else mask.amax(-2, keepdim=True)
        mask = torch.cat([mask, seen.expand(-1, -1, missing, -1)], dim=-2)
    return nn.functional.pad(mask, (0, missing), value=1 if mask.dtype == torch.bool else 0)


def _refuse_mask(*masks: Any) -> None:
    if any(mask is not None for mask in masks):
        raise ValueError(
            "`attention_mask` must be None in a batch with `adapter_names`, whose rows have different numbers of "
            "visual prompts. Use images of one size, or one adapter at a time; with "
            "attn_implementation='flex_attention', which always makes a mask, use 'sdpa' instead."
        )
