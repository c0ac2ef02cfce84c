"""Fine-tuning on what stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.utils.data import Dataset

from .base import Request
from .tuning import Tuning


@dataclass
class Finetune(Tuning):
    """Goes on training on the retain set alone and relies on catastrophic forgetting."""

    name: ClassVar[str] = "finetune"
    epochs: float = 2.0

    def data(self, request: Request) -> Dataset:
        return request.retain
