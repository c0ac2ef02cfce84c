"""Forget samples with other labels: wrong classes, or the targets of other samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch.utils.data import Dataset

from ...targets import IGNORED, Alignment
from .base import Request


class WrongLabels(Dataset):
    """A classifier's rows with a wrong class each, every one of them as likely.

    Args:
        rows: mappings with a class under `labels` or `label`.
        classes: number of classes, at least 2.
        rng: what the wrong ones are drawn from, once.
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
        rows: mappings with sequences `input_ids`, `labels` and perhaps `attention_mask`.
        others: rows that targets are taken from.
        rng: what these are drawn with, once.
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
            raise ValueError("No wrong label: every retain sample has the target of the sample to forget.")
        return with_target(row, prompt, target)


class OtherTargets(Dataset):
    """A language model's rows, each prompt followed by a target that is given.

    Args:
        rows: mappings with sequences `input_ids`, `labels` and perhaps `attention_mask`.
        targets: token ids, for every row.
    """

    def __init__(self, rows: Any, targets: Sequence[list[int]]) -> None:
        self.rows, self.targets = rows, targets

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return with_target(row, split_target(row)[0], self.targets[index])


def with_target(row: Any, prompt: list[int], target: list[int]) -> dict[str, list[int]]:
    """Returns a row like another with the tokens of a prompt and a target."""
    changed = {"input_ids": prompt + target, "labels": [IGNORED] * len(prompt) + target}
    return changed | ({"attention_mask": [1] * len(changed["labels"])} if "attention_mask" in row else {})


def check_prompts(rows: Any, method: str) -> None:
    """Raises a ValueError unless all rows are prompts with targets and nothing else.

    Args:
        rows: a language model's.
        method: name of what needs them, for the message.
    """
    for place in range(len(rows)):
        row = rows[place]
        keys = set(row) if hasattr(row, "keys") else set()
        more = sorted(keys - {"input_ids", "labels", "attention_mask"})
        if not keys >= {"input_ids", "labels"} or more:
            found = f"it holds {', '.join(map(repr, sorted(keys))) or type(row).__name__}"
        else:
            prompt, target = split_target(row)
            if prompt and target:
                continue
            found = "its first token has a label already" if target else "no token of it has a label"
        raise ValueError(
            f"{method} gives prompts other targets, so every sample to forget must hold `input_ids`, `labels` of -100 "
            f"on a prompt and of token ids on the target behind it, and perhaps `attention_mask`; sample {place} does "
            f"not: {found}."
        )


def label_key(row: Any) -> str:
    """Returns the name under which a row holds its label."""
    for key in ("labels", "label"):
        if hasattr(row, "keys") and key in row:
            return key
    raise ValueError("Rows must be mappings with 'labels' (or 'label') to be given wrong ones.")


def split_target(row: Any) -> tuple[list[int], list[int]]:
    """Returns the tokens before the first one with a label, and those from there to the last one with a label.

    Padding, which `attention_mask` leaves out, is in neither.
    """
    mask = row["attention_mask"] if "attention_mask" in row else [1] * len(row["labels"])
    kept = [place for place, there in enumerate(mask) if there]
    labels, ids = ([int(row[name][place]) for place in kept] for name in ("labels", "input_ids"))
    places = [place for place, label in enumerate(labels) if label != IGNORED]
    if not places:
        return ids, []
    return ids[: places[0]], ids[places[0] : places[-1] + 1]


@torch.no_grad()
def count_classes(request: Request) -> int:
    """Returns the number of classes, or of tokens: the width of the model's outputs."""
    alignment, device = Alignment.of(request.model), next(request.model.parameters()).device
    batch = request.collator([request.forget[0]])
    arguments, labels = alignment.split(send_to_device(batch, device))
    outputs, _ = alignment.pair(request.model.eval()(**arguments), labels)
    return outputs.shape[-1]


def mislabelled(request: Request, rng: np.random.Generator) -> Dataset:
    """Returns the forget set with wrong labels: other classes, or for a language model the targets of retain samples.

    Raises:
        ValueError: the model has one class, or a label for every token without being a causal language model.
    """
    alignment = Alignment.of(request.model)
    if alignment.kind == "next token":
        return OthersTargets(request.forget, request.retain, rng)
    if alignment.kind == "token":
        raise ValueError(
            f"Wrong labels are made for classifiers of samples and for causal language models; {alignment.model} has "
            "labels for tokens that are not predicted one after the other."
        )
    classes = count_classes(request)
    if classes < 2:
        raise ValueError(f"A model of {classes} class has no wrong label.")
    return WrongLabels(request.forget, classes, rng)
