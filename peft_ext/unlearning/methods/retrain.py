"""The gold: a model that never saw the forget set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from transformers import Trainer, TrainingArguments

from ...training.callbacks import StopAfter
from ...training.trainer import CheckedTrainer, EvaluationTrainer
from .base import Request, Tuned
from .tuning import TrainingMethod


@dataclass
class Retrain(TrainingMethod):
    """Puts the initial parameters back and trains on the retain set, with the arguments of the model's training.

    Where that training was stopped early, `Request.stopped_after` of the planned steps, so is this one.
    It is what the other methods try to come close to at less cost. In evaluation mode frozen blocks below the first
    adapter are computed once a sample, as in the solvers.
    """

    name: ClassVar[str] = "retrain"
    needed: ClassVar[tuple[str, ...]] = ("reference", "training")

    def train(self, request: Request) -> Trainer:
        self.start(request)
        trainer_class = EvaluationTrainer if request.eval_mode else CheckedTrainer
        callbacks = [StopAfter(request.stopped_after)] if request.stopped_after < 1 else []
        return request.fit(request.retain, self.schedule(request), trainer_class, callbacks=callbacks)

    def start(self, request: Request) -> None:
        """Gives the model the parameters from which it is trained."""
        request.restore_initial()

    def schedule(self, request: Request) -> TrainingArguments:
        """Returns the arguments of the training, which is stopped after the same share of its steps as the model's."""
        return request.training

    def facts(self, trainer: Trainer) -> Tuned:
        ended = "steps" if trainer.state.global_step >= trainer.state.max_steps else "share"
        return Tuned(trainer.state.global_step, trainer.args.learning_rate, ended, from_initial=True)
