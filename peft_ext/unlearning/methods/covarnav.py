"""CovarNav: wrong labels, within the directions that what stays does not need (Abbasi et al., "CovarNav: Machine
Unlearning via Model Inversion and Covariance Navigation", 2023)."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import ConcatDataset, Dataset
from transformers import Trainer

from ...checks import check_choice, check_positive, check_positive_integer, check_share
from ...training.callbacks import trainable_parameters
from ...training.projection import Projection, ProjectUpdates
from ..derivatives.data import sample_keys
from ..derivatives.function import AdapterFunction
from ..derivatives.losses import CrossEntropy
from ..derivatives.quadratic import DRAWS, MEMORY, RowSum, SampledQuadratic, smaller_form
from .base import Request, Tuned
from .images import image_key
from .inversion import inverted, norms_with_statistics
from .relabelling import count_classes, label_key
from .soft_targets import SoftCollator, SoftTargets, SoftTrainer, outputs_at_targets
from .tuning import Tuning

_PREDICTION_DAMPING = 0.03
"""As little as the outcome hardly depends on it; the step itself would lead out of what is nearly linear."""


def without_own_label(outputs: torch.Tensor, targets: torch.Tensor, labels: str) -> torch.Tensor:
    """Returns a distribution of labels that the target has no part in, for every output: `(targets, c)`.

    Args:
        outputs: `(targets, c)`.
        targets: `(targets,)`.
        labels: `"runner_up"`, the most probable of the others; `"others"`, all of them, as likely as the model has it.
    """
    others = outputs.scatter(-1, targets[:, None], -torch.inf)
    return others.softmax(-1) if labels == "others" else one_hot(others.argmax(-1), outputs.shape[-1]).to(outputs)


class UntilForgotten(SoftTrainer):
    """Ends after the step in which the loss of the rows' own labels has reached a bound.

    Args:
        max_loss: the bound.
        *args, **kwargs: what a `SoftTrainer` takes.

    Attributes:
        reached: that loss in the last step's batch, a mean over targets.
    """

    def __init__(self, max_loss: float, *args: Any, **kwargs: Any) -> None:
        super().__init__("cross_entropy", *args, **kwargs)
        self.max_loss = max_loss
        self.reached = 0.0
        self._losses: list[torch.Tensor] = []

    def values(self, outputs: torch.Tensor, wanted: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        own = -outputs.detach().log_softmax(-1).gather(-1, labels[:, None])
        self._losses.append(own.mean())
        return super().values(outputs, wanted, labels)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        found = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            # All processes must stop together.
            self.reached = float(self.accelerator.reduce(torch.stack(self._losses).mean(), "mean"))
            self._losses.clear()
            self.control.should_training_stop |= self.reached >= self.max_loss
        return found


@dataclass
class CovarNav(Tuning):
    """Trains on the forget set with other labels, and keeps out of the directions in which what stays would change.

    Every step of the optimizer is projected away from the leading directions of the curvature of what stays: the
    covariance of a layer's inputs in the paper, which protects the weights of whole layers (section 3.3); here that of
    the loss in all trained parameters together, which are few. Projected is what the optimizer does, not the gradient,
    which Adam would turn back into the protected directions.

    What is protected is known from one of three sources:

    - `"ledger"`: the curvature over all training samples, which `prepare` takes at training time, less that of the
      forget set. The retain set is not read afterwards.
    - `"retain"`: the same, taken at the time of the request, from both sets.
    - `"inverted"`: images that the model takes for samples of the classes that stay, made from the statistics of its
      batch-norm layers, as in the paper. The retain set is not read at all. All classes are made, or if the forget set
      holds a single one, all others.

    The labels are those that the trained model finds most probable beside the true ones. It ends when the loss of the
    true labels is what a retrained model's would be: a random part of the data can be forgotten too well. The first
    two sources predict that loss, as the outputs of the linearised model say it, and lead part of the way by a damped
    Newton step; with the third it is that of a guess. (The paper has neither.)

    Attributes:
        epochs: passes over the forget set at most.
        protect: `"ledger"`, `"retain"` or `"inverted"`.
        energy: share of the trace of the curvature that is protected.
        labels: `"others"`, the model's distribution without the true label; `"runner_up"`, as in the paper, the most
            probable of the others alone.
        first_damping: of the Newton step that comes first, in units of the mean of the curvature's diagonal; None for
            no such step. Inverted images know of none.
        max_loss: it ends after the step whose batch had this loss or more, of the true labels. If None, what is
            predicted of retraining; for inverted images the logarithm of the number of classes.
        draws: random vectors a sample that estimate the curvature; None for the exact one.
        memory: bytes for matrices.
        images: number of inverted images.
        inversion_steps: steps of Adam that make them.
    """

    name: ClassVar[str] = "covarnav"
    epochs: float = 20.0
    protect: str = "ledger"
    energy: float = 0.99
    labels: str = "others"
    first_damping: float | None = 1.0
    max_loss: float | None = None
    draws: int | None = DRAWS
    memory: float = MEMORY
    images: int = 50
    inversion_steps: int = 200
    _kept: tuple[Request, SampledQuadratic] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("protect", self.protect, ("ledger", "retain", "inverted"))
        check_share("energy", self.energy)
        check_choice("labels", self.labels, ("others", "runner_up"))
        for name in ("first_damping", "max_loss"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        if self.draws is not None:
            check_positive_integer("draws", self.draws)
        check_positive("memory", self.memory)
        check_positive_integer("images", self.images)
        check_positive_integer("inversion_steps", self.inversion_steps)

    def check(self, request: Request) -> None:
        if self.protect != "inverted":
            return
        image_key(request, "CovarNav with protect='inverted'")
        if not norms_with_statistics(request.model):
            raise ValueError(
                "CovarNav with protect='inverted' makes images from the running statistics of batch-norm layers, and "
                f"{type(request.model).__name__} has no such layer. Give protect='ledger', which needs no retain data "
                "after the training, or protect='retain'."
            )

    def prepare(self, request: Request) -> None:
        """Takes the curvature over all training samples, for `protect="ledger"`."""
        if self.protect == "ledger":
            self._kept = request, self._quadratic(request)

    def _quadratic(self, request: Request) -> SampledQuadratic:
        everything: Any = ConcatDataset([request.retain, request.forget])
        function, loader = self._function(request), request.shared_loader(everything)
        form, initial = self._form(function, loader, len(everything)), function.flatten(request.initial)
        with function.prefix.remembering():
            return SampledQuadratic.of(function, loader, form, initial, request.ridge, self.draws)[0]

    def _function(self, request: Request) -> AdapterFunction:
        request.model.to(request.training.device)  # type: ignore[arg-type]
        request.model.eval()
        return AdapterFunction(request.model, CrossEntropy(), memory=self.memory / 4)

    def _form(self, function: AdapterFunction, loader: Any, samples: int) -> str:
        form, need = smaller_form(function.size, samples * function.rows_of_a_sample(loader, self.draws))
        if need > self.memory:
            raise ValueError(
                f"The curvature of {function.size:,} parameters and {samples:,} samples needs {need / 1e9:.3g} GB, and "
                f"`memory` allows {self.memory / 1e9:.3g} GB. Raise it, or lower `draws`."
            )
        return form

    def plan(self, request: Request) -> tuple[Projection, float]:
        """Returns the projection, and the loss of the true labels at which to end, after the first step is taken."""
        function = self._function(request)
        guess = math.log(count_classes(request))
        if self.protect == "inverted":
            rows = self._inverted(request)
            loader = request.loader(rows)  # type: ignore[arg-type]
            sums = RowSum(self._form(function, loader, len(rows)), function)
            for found in function.linearise(loader, self.draws):
                sums.add(found.rows)
            return self._projection(sums.form, sums.total(), function), guess
        if self._kept is None or self._kept[0] is not request:
            self._kept = request, self._quadratic(request)
        (_, kept), self._kept = self._kept, None
        forget = request.shared_loader(request.forget)
        remaining, _ = kept.without(function, forget, Counter(sample_keys(forget)))

        def step(damping: float) -> torch.Tensor:
            shift = damping * kept.mean_curvature
            return (remaining.newton_step(shift) - kept.newton_step(shift)).to(function.device)

        predicted = function.along(request.loader(request.forget), step(_PREDICTION_DAMPING))
        labels = [targets for _, targets in outputs_at_targets(request, request.forget)]
        expected = float(cross_entropy(torch.cat(predicted).double(), torch.cat(labels)))
        projection = self._projection(remaining.form, remaining.terms, function)
        if self.first_damping is not None:
            function.vector = function.vector + step(self.first_damping)
        return projection, expected

    def _projection(self, form: str, terms: torch.Tensor, function: AdapterFunction) -> Projection:
        terms = terms.to(function.device)
        return Projection(terms.flatten(0, 1) if form == "kernel" else terms, self.energy, form == "parameter")

    def _inverted(self, request: Request) -> list[dict[str, Any]]:
        key = image_key(request, "CovarNav with protect='inverted'")
        own = {int(row[label_key(row)]) for row in map(request.forget.__getitem__, range(len(request.forget)))}  # type: ignore[arg-type]
        classes = [label for label in range(count_classes(request)) if len(own) > 1 or label not in own]
        labels = [classes[i % len(classes)] for i in range(self.images)]
        like, seed = request.forget, request.training.seed
        return inverted(request.model, like, request.collator, key, labels, self.inversion_steps, seed)

    def data(self, request: Request) -> Dataset:
        found = outputs_at_targets(request, request.forget)
        return SoftTargets(request.forget, [without_own_label(*each, self.labels) for each in found])

    def train(self, request: Request) -> Trainer:
        self.check(request)
        data = self.data(request)
        projection, expected = self.plan(request)
        callback = ProjectUpdates(trainable_parameters(request.model), projection)
        soft = replace(request, collator=SoftCollator(request.collator))
        trainer_class = partial(UntilForgotten, expected if self.max_loss is None else self.max_loss)
        return soft.fit(data, self.arguments(request), trainer_class, callbacks=[callback])

    def facts(self, trainer: Trainer) -> Tuned:
        assert isinstance(trainer, UntilForgotten)
        ended = "bound" if trainer.reached >= trainer.max_loss else "steps"
        return replace(super().facts(trainer), ended=ended, last_loss=trainer.reached)
