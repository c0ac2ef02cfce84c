"""The gold: a model that never saw the forget set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from transformers import Trainer

from ...training.trainer import EvaluationTrainer
from .base import Request, UnlearningMethod


@dataclass
class Retrain(UnlearningMethod):
    """Puts the initial parameters back and trains on the retain set, with the arguments of the model's training.

    What the other methods try to come close to at less cost.
    """

    name: ClassVar[str] = "retrain"

    def unlearn(self, request: Request) -> list[str]:
        """Train anew."""
        request.restore_initial()
        trainer_class = EvaluationTrainer if request.eval_mode else Trainer
        trainer = request.fit(request.retain, request.training, trainer_class)
        return [f"{trainer.state.global_step} steps from the initial parameters"]
