"""The gold: a model that never saw the forget set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from ...training.trainer import CheckedTrainer, EvaluationTrainer
from ..derivatives.data import Loader
from .base import Request, Tuned, UnlearningReport
from .tuning import TrainingMethod


@dataclass
class Retrain(TrainingMethod):
    """Puts the initial parameters back and trains on the retain set, with the arguments of the model's training.

    It is what the other methods try to come close to at less cost.
    """

    name: ClassVar[str] = "retrain"

    def train(self, request: Request) -> Trainer:
        request.restore_initial()
        trainer_class = EvaluationTrainer if request.eval_mode else CheckedTrainer
        return request.fit(request.retain, request.training, trainer_class)

    def facts(self, trainer: Trainer) -> Tuned:
        return Tuned(trainer.state.global_step, trainer.args.learning_rate, from_initial=True)

    def fit(
        self,
        model: nn.Module,
        retain: Loader,
        forget: Loader,
        *,
        reference: Mapping[str, torch.Tensor] | None = None,
        ridge: float = 0.0,
        training: TrainingArguments | None = None,
    ) -> UnlearningReport:
        """Trains a model anew, in evaluation mode; see `TrainingMethod.fit`.

        Raises:
            ValueError: `reference` or `training` is missing.
        """
        if reference is None or training is None:
            raise ValueError(
                "Retraining needs `reference`, the trainable parameters before the training (`trainable_state(model)` "
                "copies them), and `training`, the TrainingArguments of the training."
            )
        return super().fit(model, retain, forget, reference=reference, ridge=ridge, training=training)
