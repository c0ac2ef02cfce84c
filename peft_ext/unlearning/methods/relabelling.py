"""Forget samples with other labels: wrong classes, or the targets of other samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ...targets import IGNORED
from .base import Request


class WrongLabels(Dataset):
    """A classifier's rows with a wrong class each, every one of them as likely.

    Args:
        rows: Mappings with a class under `labels` or `label`.
        classes: Their number, at least 2.
        rng: What they are drawn from, once.
    """

    def __init__(self, rows: Any, classes: int, rng: np.random.Generator) -> None:
        self.rows, self.classes = rows, classes
        self.shifts = rng.integers(1, classes, len(rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = dict(self.rows[index])
        key = label_key(row)
        row[key] = (row[key] + int(self.shifts[index])) % self.classes
        return row


class OthersTargets(Dataset):
    """A language model's rows, each prompt followed by the target of a random retain sample.

    A prompt is what stands before the first token with a loss. Random tokens would be wrong as well, but teach the
    model nothing that it could say instead. A row without a prompt becomes the retain sample as a whole.

    Args:
        rows: Mappings with sequences `input_ids`, `labels` and perhaps `attention_mask`.
        others: Where targets are taken from.
        rng: What they are drawn with, once.
    """

    def __init__(self, rows: Any, others: Any, rng: np.random.Generator) -> None:
        self.rows, self.others = rows, others
        self.partners = rng.integers(0, len(others), len(rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        (prompt, own), partner = split_target(row), int(self.partners[index])
        for place in range(len(self.others)):
            target = split_target(self.others[(partner + place) % len(self.others)])[1]
            if target != own:
                break
        else:
            raise ValueError("random_labels: every retain sample has the target of the sample to forget")
        changed = {"input_ids": prompt + target, "labels": [IGNORED] * len(prompt) + target}
        return changed | ({"attention_mask": [1] * len(changed["labels"])} if "attention_mask" in row else {})


def label_key(row: Any) -> str:
    """Under which name a row holds its label."""
    for key in ("labels", "label"):
        if hasattr(row, "keys") and key in row:
            return key
    raise ValueError("rows must be mappings with 'labels' (or 'label') to be given wrong ones")


def split_target(row: Any) -> tuple[list[int], list[int]]:
    """The tokens before the first one with a loss, and those after it up to the last one with a loss."""
    labels, ids = list(map(int, row["labels"])), list(map(int, row["input_ids"]))
    places = [place for place, label in enumerate(labels) if label != IGNORED]
    if not places:
        return ids, []
    return ids[: places[0]], ids[places[0] : places[-1] + 1]


@torch.no_grad()
def count_classes(request: Request) -> int:
    """The number of classes, or of tokens: the width of the model's outputs."""
    batch = request.collator([request.forget[0]])
    device = next(request.model.parameters()).device
    outputs = request.model.eval()(
        **{name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
    )
    return outputs.logits.shape[-1]


def mislabelled(request: Request, rng: np.random.Generator) -> Dataset:
    """The forget set with wrong labels: other classes, or for a language model the targets of retain samples."""
    row: Any = request.forget[0]
    label = row[label_key(row)]
    is_sequence = label.dim() > 0 if torch.is_tensor(label) else isinstance(label, (Sequence, np.ndarray))
    if is_sequence:
        return OthersTargets(request.forget, request.retain, rng)
    classes = count_classes(request)
    if classes < 2:
        raise ValueError(f"random_labels: a model of {classes} class has no wrong label")
    return WrongLabels(request.forget, classes, rng)
