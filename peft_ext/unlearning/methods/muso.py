"""MUSO: training on the labels that retraining would give (Yang et al., "MUSO: Achieving Exact Machine Unlearning in
Over-Parameterized Regimes", 2024)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch.utils.data import ConcatDataset, Dataset
from transformers import Trainer

from ...checks import check_choice, check_positive, check_positive_integer, check_share
from ..derivatives.function import AdapterFunction
from ..derivatives.losses import LOSSES
from ..derivatives.quadratic import (
    DRAWS,
    MEMORY,
    Quadratic,
    bytes_needed,
    estimated_curvature,
    ridge_gradient,
    smaller_form,
)
from .base import Request
from .rows import share_of
from .soft_targets import SoftCollator, SoftTargets, SoftTrainer
from .tuning import Tuning

_FORMS = ("parameter", "kernel", "matrix_free")


@dataclass
class MUSO(Tuning):
    """Trains on the retain set and on the forget set with the outputs that retraining would have led to.

    For a model that is linear in its parameters and fits all its samples, with weights w after a training from w0, the
    weights of retraining are `w0 + P_r (w - w0)` with the projection `P_r` on the span of the retain samples'
    features. Training on the forget samples with what these weights say of them, beside the retain set, leads there
    exactly (theorem 1 of the paper). Here the features are the tangent features of all trained parameters, the rows of
    the Jacobian at the trained weights, with the curvature of the loss in the outputs and with the ridge of the
    training: the step is `-(G_r + (ridge + shift) I)^-1 b_r` with the retain loss's gradient
    `b_r = g_r + (ridge + shift) (w - w0)`, less what training left of the gradient on all data. Its limit for small
    shifts is the projection. (The authors take the features of the last layer, and the most probable class of the
    result; a label that stays the most probable one would unlearn nothing, so the outputs are kept as they are.)

    Needs the parameters before the training. While training here the ridge is as much weaker as the retain set is
    smaller than all data, for that is its part in retraining.

    Attributes:
        epochs: passes over both sets in each round.
        loss: `"cross_entropy"` or `"squared_error"`: what the model was trained with.
        damping: the shift, in units of the mean of the diagonal of the curvature.
        rounds: how often labels are made, from the weights that the round before led to, and trained on.
        retain_share: how much of the retain set is trained on, drawn with the training's seed; the labels come from
            all of it.
        form: how the curvature is kept, `"parameter"`, `"kernel"` or `"matrix_free"` (memory O(p), many passes over the
            retain set); `"auto"` is the smaller of the first two, or the last one if they do not fit `memory`.
        draws: random vectors a sample that estimate the curvature; None for the exact one.
        memory: bytes for matrices.
    """

    name: ClassVar[str] = "muso"
    needed: ClassVar[tuple[str, ...]] = ("reference",)
    epochs: float = 2.0
    loss: str = "cross_entropy"
    damping: float = 0.3
    rounds: int = 1
    retain_share: float = 1.0
    form: str = "auto"
    draws: int | None = DRAWS
    memory: float = MEMORY

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("loss", self.loss, tuple(LOSSES))
        check_positive("damping", self.damping)
        check_positive_integer("rounds", self.rounds)
        check_share("retain_share", self.retain_share)
        check_choice("form", self.form, ("auto", *_FORMS))
        if self.draws is not None:
            check_positive_integer("draws", self.draws)
        check_positive("memory", self.memory)

    def data(self, request: Request) -> Dataset:
        """Returns both sets, the forget set with the outputs of retraining."""
        retain = share_of(request.retain, self.retain_share, request.rng())
        return ConcatDataset([SoftTargets(request.forget, self.labels(request)), SoftTargets(retain)])

    def labels(self, request: Request) -> list[torch.Tensor]:
        """Returns what retraining would make the model say at the targets of every forget sample.

        Returns:
            Probabilities, or outputs for the squared error, `(targets, c)` for every sample.
        """
        function = AdapterFunction(request.model, LOSSES[self.loss](), memory=self.memory / 4)
        with function.prefix.remembering():
            outputs = function.along(request.loader(request.forget), self.step(request, function))
        return [each.softmax(-1) for each in outputs] if self.loss == "cross_entropy" else outputs

    def step(self, request: Request, function: AdapterFunction) -> torch.Tensor:
        """Returns the way from the weights to those of retraining, for outputs linear in them, `(size,)`."""
        retain, forget = (request.shared_loader(part) for part in (request.retain, request.forget))
        _, forgotten, forget_gradient = function.loss_and_gradient(forget)
        _, kept, gradient = function.loss_and_gradient(retain)
        weights, start = function.vector, function.flatten(request.initial)
        samples = len(request.retain)  # type: ignore[arg-type]
        rows = samples * function.rows_of_a_sample(retain, self.draws)
        curvature, _ = estimated_curvature(
            function, retain, self._form(function.size, rows), samples, self.draws, None, along=gradient
        )
        shift = self.damping * curvature.mean
        left = ridge_gradient(gradient + forget_gradient, kept + forgotten, weights, start, request.ridge)
        slope = ridge_gradient(gradient, kept, weights, start, request.ridge + shift)
        return Quadratic(curvature, slope - left, request.ridge).newton_step(shift)

    def _form(self, size: int, rows: int) -> str:
        if self.form == "auto":
            form, need = smaller_form(size, rows)
            return form if need <= self.memory else "matrix_free"
        need = bytes_needed(self.form, size, rows)
        if need > self.memory:
            raise ValueError(
                f"form={self.form!r} needs {need / 1e9:.3g} GB ({size:,} parameters, {rows:,} rows of the Jacobian), "
                f"and `memory` allows {self.memory / 1e9:.3g} GB. form='matrix_free' needs no matrix; or raise it."
            )
        return self.form

    def train(self, request: Request) -> Trainer:
        request.model.to(request.training.device)  # type: ignore[arg-type]
        kept, gone = len(request.retain), len(request.forget)  # type: ignore[arg-type]
        soft = replace(request, collator=SoftCollator(request.collator), ridge=request.ridge * kept / (kept + gone))
        steps = 0
        for _ in range(self.rounds):
            trainer = soft.fit(self.data(request), self.arguments(request), partial(SoftTrainer, self.loss))
            steps += trainer.state.global_step
        trainer.state.global_step = steps  # the report tells those of all rounds
        return trainer
