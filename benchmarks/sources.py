"""What tells base models and data apart, wherever their files lie and whatever those are called."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from recipes.tasks.base import Task


def source_of(task: Task) -> str:
    """Returns the digest of a task's base model, without the head that every training draws anew, and of its rows."""
    model = task.fresh_model()
    heads = tuple(f"{name}." for name in task.head)
    weights = [value for name, value in model.named_parameters() if not name.startswith(heads)]
    found = task.trainer_arguments(model)
    return digest_of(weights, found["train_dataset"], found["eval_dataset"])


def digest_of(weights: Iterable[torch.Tensor], *splits: Iterable[Mapping[str, Any]]) -> str:
    """Returns a short digest of the weights of a base model and of the rows of a data set.

    Args:
        weights: in any order, since libraries rename parameters and move them.
        *splits: rows as the model takes them, so that a tokenizer or an image processor counts too.
    """
    found = hashlib.sha256("".join(sorted(map(_digest, weights))).encode())
    for rows in splits:
        found.update(b"split")
        for row in rows:
            found.update("".join(f"{name} {_digest(row[name])}" for name in sorted(row)).encode())
    return found.hexdigest()[:12]


def _digest(value: Any) -> str:
    """Returns the digest of a text, or of numbers with their shape and type."""
    if isinstance(value, str):
        return hashlib.sha256(value.encode()).hexdigest()
    tensor = torch.as_tensor(value).detach().cpu().contiguous()
    found = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    if tensor.numel():
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def source_entry(found: str, known: str | None) -> dict[str, str]:
    """Returns what a line says of its base model and data.

    Args:
        found: the digest of both.
        known: the digest of those that the lines from before there was such an entry are of. New lines of them lack it
            too, and so belong to the same measurements.
    """
    return {} if found == known else {"source": found}
