"""Taking most of a training back and going on without the forget set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import Trainer

from ...checks import check_probability, check_share
from ...training.callbacks import trainable_parameters
from .base import Request, Tuned
from .retrain import Retrain
from .tuning import TrainingMethod, squeezed


@dataclass
class Rewind(Retrain):
    """Takes the parameters back towards their initial values and trains on the retain set from there.

    What the training had moved is shrunk to a share of it, as Ash & Adams 2020 ("On warm-starting neural network
    training") shrink weights before a training goes on. What the forget set alone had taught shrinks with it, and the
    retain set does not bring it back. No step looks at the forget set, and nothing is linearised, so it suits adapters
    in every layer. A share of nothing is retraining in fewer epochs, a share of all is fine-tuning. After a training
    that was stopped early there is little to forget and much to learn again: compare it with fine-tuning there.

    Attributes:
        keep: the share of the way from the initial parameters that is left, from 0 to below 1.
        share: passes over the retain set, as a share of those that the training had made; above 0 and at most 1. The
            schedule of the learning rate is that of the training, squeezed.
    """

    name: ClassVar[str] = "rewind"
    keep: float = 0.3
    share: float = 0.4

    def __post_init__(self) -> None:
        check_probability("keep", self.keep)
        check_share("share", self.share)

    def train(self, request: Request) -> Trainer:
        with torch.no_grad():
            for name, parameter in trainable_parameters(request.model).items():
                start = request.initial[name].to(parameter)
                parameter.copy_(start + self.keep * (parameter - start))
        return request.fit(request.retain, squeezed(request.training, self.share * request.stopped_after))

    def facts(self, trainer: Trainer) -> Tuned:
        return TrainingMethod.facts(self, trainer)
