"""NatMU: hybrids of forget and retain images (He et al., "Towards Natural Machine Unlearning", IEEE TPAMI 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset
from transformers import Trainer

from ...checks import check_number, check_positive_integer, check_share
from .base import Request
from .images import image_key
from .relabelling import label_key
from .rows import share_of
from .soft_targets import outputs_at_targets
from .tuning import Tuning


def masks(height: int, width: int, delta: float) -> list[torch.Tensor]:
    """Returns four masks `(height, width)`: how much of the forget image a hybrid holds at every pixel.

    A triangle along the rows, one along the columns, and both turned inside out, from 0 to almost 1.

    Args:
        height, width: of the images.
        delta: added to all of them; they are cut off at 0 and 1.
    """

    def triangle(length: int) -> torch.Tensor:
        place = torch.arange(length)
        return torch.minimum(place, length - 1 - place) / max(length / 2, 1)

    rows, columns = triangle(height)[:, None].expand(height, width), triangle(width)[None].expand(height, width)
    found = [rows, columns, rows.max() - rows, columns.max() - columns]
    return [(mask + delta).clamp(0, 1) for mask in found]


class Hybrids(Dataset):
    """Mixtures of two images each, with the label of the second one.

    Args:
        forget: rows with the first images.
        retain: rows with the second ones.
        pairs: places of the two rows of every hybrid, and the number of its mask.
        masks: of which shares of the first image, `(height, width)`.
        key: name of the image in a row.
    """

    def __init__(
        self, forget: Any, retain: Any, pairs: Sequence[tuple[int, int, int]], masks: Sequence[torch.Tensor], key: str
    ) -> None:
        self.forget, self.retain, self.pairs, self.masks, self.key = forget, retain, pairs, masks, key

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        first, second, number = self.pairs[index]
        row = dict(self.retain[second])
        own, other = (torch.as_tensor(each[self.key]) for each in (self.forget[first], row))
        mask = self.masks[number].to(other)
        row[self.key] = mask * own.to(other) + (1 - mask) * other
        return row


@dataclass
class NatMU(Tuning):
    """Trains on the retain set and on mixtures of forget and retain images, with the label of the retain image.

    Wrong labels would teach the model something false of what it is to forget; here the part of the retain image in a
    mixture explains the label. Every forget image is mixed with one of each of the classes that the trained model
    finds most probable beside its own (section 3.2 of the paper), among those that the retain set has samples of. The
    images of a class are dealt out in turn, in an order that the training's seed decides.

    For classifiers of images. The mixtures hold a part of the images to forget: they are made when they are read, and
    are nowhere kept.

    Attributes:
        hybrids: mixtures of every forget image, at most as many as there are other classes.
        delta: added to the share of the forget image at every pixel of a mixture, which is 0.47 on average: the more,
            the more of it is in a mixture. The authors searched it for each task, between -0.19 and 0.045.
        retain_share: how much of the retain set is trained on, drawn with the training's seed.
    """

    name: ClassVar[str] = "natmu"
    universal: ClassVar[bool] = False

    epochs: float = 2.0
    hybrids: int = 4
    delta: float = -0.05
    retain_share: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_integer("hybrids", self.hybrids)
        check_number("delta", self.delta)
        if not -1 < self.delta < 1:
            raise ValueError(f"`delta` must be above -1 and below 1, got {self.delta!r}.")
        check_share("retain_share", self.retain_share)

    def check(self, request: Request) -> None:
        image_key(request, "NatMU")
        classes = {_label(request.retain[place]) for place in range(len(request.retain))}  # type: ignore[arg-type]
        for place in range(len(request.forget)):  # type: ignore[arg-type]
            own = _label(request.forget[place])
            if not classes - {own}:
                raise ValueError(
                    "NatMU mixes every forget image with retain images of other classes; for a forget image of class "
                    f"{own} there are none: the retain set holds the classes {sorted(classes)}. Retraining and "
                    "Gauss-Newton steps need no other class."
                )

    def data(self, request: Request) -> Dataset:
        self.check(request)
        key, rng, retain = image_key(request, "NatMU"), request.rng(), request.retain
        pairs = self._pairs(request, rng)
        height, width = torch.as_tensor(request.forget[0][key]).shape[-2:]
        hybrids = Hybrids(request.forget, retain, pairs, masks(height, width, self.delta), key)
        return ConcatDataset([hybrids, share_of(retain, self.retain_share, rng)])

    def _pairs(self, request: Request, rng: np.random.Generator) -> list[tuple[int, int, int]]:
        """Returns the places of forget and retain rows, and the mask, of every hybrid."""
        rows: Any = request.retain
        members: dict[int, list[int]] = {}
        for place in rng.permutation(len(rows)).tolist():
            members.setdefault(_label(rows[place]), []).append(place)
        dealt = dict.fromkeys(members, 0)
        pairs = []
        for first, (outputs, targets) in enumerate(outputs_at_targets(request, request.forget)):
            order = [label for label in outputs[0].argsort(descending=True).tolist() if label != int(targets[0])]
            for number, label in enumerate([label for label in order if label in members][: self.hybrids]):
                pairs.append((first, members[label][dealt[label] % len(members[label])], number % 4))
                dealt[label] += 1
        return pairs

    def train(self, request: Request) -> Trainer:
        request.model.to(request.training.device)  # type: ignore[arg-type]
        return super().train(request)


def _label(row: Any) -> int:
    return int(row[label_key(row)])
