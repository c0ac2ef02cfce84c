"""Rows with an image each: what methods that make images need."""

from __future__ import annotations

import numpy as np
import torch

from ...targets import Alignment
from .base import Request


def image_key(request: Request, what: str) -> str:
    """Returns the name under which the rows to forget hold their image, `(channels, height, width)` of real numbers.

    Args:
        request: whose rows they are.
        what: what needs an image, as the start of a message.

    Raises:
        ValueError: the model is no classifier of samples, or its rows hold no image, or several.
    """
    alignment, row = Alignment.of(request.model), request.forget[0]
    found = [
        name
        for name, value in (row.items() if hasattr(row, "items") else ())
        if isinstance(value, (torch.Tensor, np.ndarray, list))
        and torch.as_tensor(value).dim() == 3
        and torch.as_tensor(value).is_floating_point()
    ]
    if alignment.kind in ("next token", "token") or len(found) != 1:
        holds = ", ".join(map(repr, row)) if hasattr(row, "keys") else f"a {type(row).__name__}"
        raise ValueError(
            f"{what} needs images: rows of a classifier with one tensor of real numbers, (channels, height, width), "
            f"each. {alignment.model} has rows of {holds}. Other methods work on texts."
        )
    return found[0]
