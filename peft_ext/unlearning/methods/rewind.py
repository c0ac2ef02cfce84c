"""Taking most of a training back and going on without the forget set."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

from transformers import Trainer, TrainingArguments

from ...checks import check_probability, check_share
from ...training.trainer import mean_loss
from .base import Request, Tuned, UnlearningReport
from .retrain import Retrain
from .rows import some_of
from .tuning import TrainingMethod, squeezed

MEASURED = 512
"""So many samples of the retain set at most say what it lost; whole passes over a large one take more than the rest."""


@dataclass
class Rewind(Retrain):
    """Takes the parameters back towards their initial values and trains on the retain set from there.

    What the training had moved is shrunk to a share of it, as Ash & Adams 2020 ("On warm-starting neural network
    training") shrink weights before a training goes on. What the forget set alone had taught shrinks with it, and the
    retain set does not bring it back. No step looks at the forget set, and nothing is linearised, so it suits adapters
    in every layer. A share of nothing is retraining in fewer epochs, a share of all is fine-tuning.

    The training on the retain set goes through the schedule of the model's training, squeezed, and stops where that was
    stopped. Its learning rate is higher by `(1 - keep) / share`: along a direction of small curvature a training goes
    as far as its learning rates add up to, and so it makes up for just what was taken back. Along a direction of large
    curvature it ends where the gold does anyway. The report says what the retain set lost.

    Attributes:
        keep: the share of the way from the initial parameters that is left, from 0 to below 1.
        share: passes over the retain set, as a share of those that the training had made; above 0 and at most 1.
    """

    name: ClassVar[str] = "rewind"
    keep: float = 0.4
    share: float = 0.4

    def __post_init__(self) -> None:
        check_probability("keep", self.keep)
        check_share("share", self.share)

    def unlearn(self, request: Request) -> UnlearningReport:
        start = time.perf_counter()
        retained = request.model, some_of(request.retain, MEASURED, request.rng()), request.collator, request.training
        before = mean_loss(*retained)
        report = super().unlearn(request)
        report.retain_loss = before, mean_loss(*retained)
        report.seconds = time.perf_counter() - start
        return report

    def start(self, request: Request) -> None:
        request.restore_initial(self.keep)

    def schedule(self, request: Request) -> TrainingArguments:
        training = squeezed(request.training, self.share)
        training.learning_rate *= (1 - self.keep) / self.share
        return training

    def facts(self, trainer: Trainer) -> Tuned:
        return TrainingMethod.facts(self, trainer)
