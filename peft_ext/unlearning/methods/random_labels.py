"""Training on wrong labels for the forget set (Golatkar et al., "Eternal Sunshine of the Spotless Net", 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.utils.data import ConcatDataset, Dataset

from ...checks import check_share
from .base import Request
from .relabelling import mislabelled
from .rows import share_of
from .tuning import Tuning


@dataclass
class RandomLabels(Tuning):
    """Trains on the forget set with wrong labels and on the retain set with the true ones, mixed.

    Attributes:
        retain_share: how much of the retain set is used, drawn with the training's seed.
    """

    name: ClassVar[str] = "random_labels"
    epochs: float = 2.0
    retain_share: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("retain_share", self.retain_share)

    def data(self, request: Request) -> Dataset:
        rng = request.rng()
        forget = mislabelled(request, rng)
        return ConcatDataset([forget, share_of(request.retain, self.retain_share, rng)])
