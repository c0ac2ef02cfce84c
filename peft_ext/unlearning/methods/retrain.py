"""The gold: a model that never saw the forget set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from ...training.callbacks import StopAfter
from ...training.trainer import CheckedTrainer, EvaluationTrainer
from .base import Request, Tuned
from .tuning import TrainingMethod


def statistics_of_norms(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the buffers that a training in training mode moves: running statistics of normalisation, by name."""
    return {
        f"{name}.{own}" if name else own: buffer
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
        for own, buffer in module.named_buffers()
    }


@dataclass
class Retrain(TrainingMethod):
    """Puts the initial parameters back and trains on the retain set, with the arguments of the model's training.

    Where that training was stopped early, `Request.stopped_after` of the planned steps, so is this one.
    It is what the other methods try to come close to at less cost. In evaluation mode frozen blocks below the first
    adapter are computed once a sample, as in the solvers.

    A training in training mode also moves the statistics of batch-norm, which then hold the forget set. They are among
    what is put back: `initial` (the `reference` of `fit`) must hold those buffers from before such a training beside
    the trainable parameters, and `eval_mode` must be False, so that the retain set makes new ones.
    """

    name: ClassVar[str] = "retrain"
    needed: ClassVar[tuple[str, ...]] = ("reference", "training")

    def check(self, request: Request) -> None:
        missing = (
            [] if request.eval_mode else sorted(statistics_of_norms(request.model).keys() - request.initial.keys())
        )
        if missing:
            raise ValueError(
                f"{type(self).__name__} in training mode moves the running statistics of normalisation layers, which "
                f"hold the forget set, and `initial` lacks {len(missing)} of those buffers, such as {missing[0]!r}. "
                "Give copies from before the model's training beside those of its trainable parameters (`fit` takes "
                "them as `reference`)."
            )

    def assumed_eval_mode(self, model: nn.Module) -> bool:
        counts = [value for name, value in statistics_of_norms(model).items() if name.endswith("num_batches_tracked")]
        if any(counts):
            raise ValueError(
                f"{type(self).__name__} must know whether the model's training moved the running statistics of its "
                "normalisation layers, which then hold the forget set. Give eval_mode=True if it ran in evaluation "
                "mode and they are from before; otherwise eval_mode=False, and a `reference` with copies of those "
                "buffers from before it."
            )
        return super().assumed_eval_mode(model)

    def train(self, request: Request) -> Trainer:
        self.check(request)
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
