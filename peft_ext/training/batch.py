"""The arguments of a model's call, sample by sample."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from ..targets import IGNORED

_LENGTH_MASK, _DECODER_MASK = "attention_mask", "decoder_attention_mask"
_WIDE = ("inputs_embeds", "decoder_inputs_embeds", "bbox")  # tensors with several numbers a token


@dataclass
class Batch:
    """The arguments of one call of a model, which can be cut into samples.

    Attributes:
        tensors: arguments with a row for every sample, `(n, ...)` each, `labels` among them where a loss is wanted.
        options: the other arguments, the same for all samples.
    """

    tensors: dict[str, torch.Tensor]
    options: dict[str, Any]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def select(self, rows: slice | list[int]) -> Batch:
        return Batch({name: tensor[rows] for name, tensor in self.tensors.items()}, self.options)

    def to(self, device: torch.device) -> Batch:
        return Batch({name: tensor.to(device) for name, tensor in self.tensors.items()}, self.options)

    def keys(self) -> list[str]:
        """Returns a SHA-256 of each sample's content without its padding: the same in whatever batch it comes.

        Padding is what `attention_mask` leaves out, left and right, in all tensors of its shape. The tensors of a
        decoder, with `labels` among them, have `decoder_attention_mask` for it, or end with the last label. So do
        labels of another text than the one that is read, from which an encoder-decoder derives its decoder's inputs.
        """
        tensors = {name: tensor.cpu().contiguous() for name, tensor in sorted(self.tensors.items())}
        masks = {_LENGTH_MASK: tensors.pop(_LENGTH_MASK, None)}
        decoder = {name for name in tensors if name.startswith("decoder_")}
        if decoder:
            decoder.add("labels")
            mask = tensors.pop(_DECODER_MASK, None)
            masks[_DECODER_MASK] = _up_to_the_last(tensors["labels"]) if mask is None else mask
        found = []
        for row in range(len(self)):
            digest = hashlib.sha256()
            for name, tensor in tensors.items():
                value = tensor[row]
                mask = masks[_DECODER_MASK if name in decoder else _LENGTH_MASK]
                if name == "labels" and not decoder and _is_other_text(tensors, mask, row):
                    value = _other_text(tensor, tensors.get("input_ids"), mask, row)
                elif mask is not None and tensor.shape[: mask.dim()] == mask.shape and _has_tokens(name, tensor):
                    value = value[mask[row].bool()]
                if value.dtype == torch.bfloat16:
                    value = value.float()
                digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
                digest.update(value.numpy().tobytes())
            found.append(digest.hexdigest())
        return found


def _is_other_text(tensors: dict[str, torch.Tensor], mask: torch.Tensor | None, row: int) -> bool:
    """Returns whether the labels of a sample are not those of what it reads, as far as that shows without the model."""
    labels, ids = tensors["labels"], tensors.get("input_ids")
    if labels.dim() != 2 or "inputs_embeds" in tensors:
        return False
    if ids is None or labels.shape != ids.shape:
        return True
    outside = torch.zeros_like(ids[row], dtype=torch.bool) if mask is None else mask[row] == 0
    return bool(((labels[row] != IGNORED) & (labels[row] != ids[row]) & outside).any())


def _other_text(labels: torch.Tensor, ids: torch.Tensor | None, mask: torch.Tensor | None, row: int) -> torch.Tensor:
    """Returns the labels of a sample up to the last target, and at least as many as it has tokens to read.

    Where both texts have as many places, whose labels they are does not show for every sample: those that are taken
    for the labels of what is read are as many as its tokens.
    """
    tokens = 0 if ids is None else ids.shape[1] if mask is None else int(mask[row].sum())
    places = (labels[row] != IGNORED).nonzero()
    length = max(tokens, int(places[-1]) + 1 if len(places) else 0)
    return torch.nn.functional.pad(labels[row, :length], (0, max(0, length - labels.shape[1])), value=IGNORED)


def _up_to_the_last(labels: torch.Tensor) -> torch.Tensor | None:
    """Returns a mask of the places up to the last target of every sample, `(n, length)`; None for a target a sample."""
    return None if labels.dim() == 1 else (labels != IGNORED).flip(-1).cumsum(-1).flip(-1) > 0


def _has_tokens(name: str, tensor: torch.Tensor) -> bool:
    """Returns whether the second dimension of a tensor is one of tokens, if it is as long as theirs."""
    return tensor.dim() == 2 or name in _WIDE
