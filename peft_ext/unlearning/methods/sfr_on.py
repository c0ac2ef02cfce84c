"""SFR-on: fast steps that forget, slow ones that keep (Huang et al., "Unified Gradient-Based Machine Unlearning with
Remain Geometry Enhancement", NeurIPS 2024)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate.utils import send_to_device
from torch.utils.data import Dataset, Subset
from transformers import Trainer, TrainerCallback

from ...checks import check_not_negative, check_positive, check_positive_integer, check_share
from ...targets import IGNORED, Alignment
from ...training.callbacks import trainable_parameters
from ...training.modes import check_dependence
from ..derivatives.data import Loader
from ..derivatives.function import AdapterFunction
from ..derivatives.losses import CrossEntropy
from ..derivatives.quadratic import DRAWS
from .base import Request
from .tuning import Tuning

_SMALL = 1e-15
_LOWEST = 0.01
"""Share of the mean loss of a batch that a sample's loss counts as at least where samples are weighed."""


def mean_fisher(function: AdapterFunction, loader: Loader) -> torch.Tensor:
    """Returns the diagonal of the Fisher matrix, the mean over the samples of a loader, `(size,)`.

    From random vectors for every sample: squares of the gradients of whole batches, in which samples cancel, would
    depend on the size of the batches.
    """
    found, samples = torch.zeros(function.size, dtype=torch.float64, device=function.device), 0
    for each in function.linearise(loader, DRAWS):
        found += each.rows.square().sum((0, 1))
        samples += len(each.rows)
    return found / samples


def adaptive_weights(losses: torch.Tensor, strength: float) -> torch.Tensor:
    """Returns weights proportional to `1 / loss^strength` with mean 1: what is known best is to be forgotten first.

    Unlike in the paper, a loss counts as a hundredth of the mean of the batch at least. A sample that is known by heart
    has a loss that rounds to zero, and hardly a gradient: it would get all the weight, and nothing would be forgotten.

    Args:
        losses: of the samples of a batch, `(n,)`, as is the result, which has no gradient.
        strength: 0 for equal weights.
    """
    losses = losses.detach()
    weights = losses.clamp(min=_LOWEST * float(losses.mean()) + _SMALL) ** -strength
    return weights / weights.mean()


class FastSlow(TrainerCallback):
    """Ascends the loss of the forget set before a retain step, and keeps a part of what some steps together did.

    Args:
        method: with the options.
        request: whose forget set it is.
        masks: True where an ascent may change a parameter, by name.
    """

    def __init__(self, method: SFRon, request: Request, masks: Mapping[str, torch.Tensor]) -> None:
        self.method, self.model, self.masks = method, request.model, masks
        self.parameters = trainable_parameters(request.model)
        self.alignment = Alignment.of(request.model)
        self.batches = self._batches(request)
        self.slow: dict[str, torch.Tensor] = {}

    def _batches(self, request: Request) -> Iterator[Mapping[str, Any]]:
        """Yields batches of the forget set, pass after pass, each in an order that the training's seed decides."""
        rng = request.rng()
        while True:
            order = rng.permutation(len(request.forget)).tolist()  # type: ignore[arg-type]
            yield from request.loader(Subset(request.forget, order), self.method.batch_size)

    def on_step_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.method.inner:
            return
        self.slow = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        if (state.global_step // self.method.inner) % self.method.every == 0:
            left = 0.5 * (1 + math.cos(math.pi * state.global_step / state.max_steps))
            self._ascend(lr_scheduler.get_last_lr()[0], self.method.ascent * left)

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.method.inner and state.global_step < state.max_steps:
            return
        for name, parameter in self.parameters.items():
            parameter.copy_(self.slow[name].lerp(parameter, self.method.slow))

    def _ascend(self, learning_rate: float, ascent: float) -> None:
        self.model.eval()
        batch = send_to_device(next(self.batches), next(iter(self.parameters.values())).device)
        arguments, labels = self.alignment.split(batch)
        outputs, targets = self.alignment.pair(self.model(**arguments), labels)
        present = (targets != IGNORED).sum(1)
        losses = CrossEntropy().values(outputs, targets) / present.clamp(min=1)
        losses = losses[present > 0]
        if not len(losses):
            return
        loss = (adaptive_weights(losses, self.method.weighting) * losses).mean()
        size = sum(map(torch.numel, self.parameters.values()))
        check_dependence(loss, size)
        found = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        parts = {name: part * self.masks[name] for name, part in zip(self.parameters, found) if part is not None}
        length = ascent * math.sqrt(sum(float(part.double().square().sum()) for part in parts.values()))
        # A step of Adam changes every number by about the learning rate: the ascent is measured by its length.
        scale = ascent * min(1.0, self.method.max_length * math.sqrt(size) / max(length, _SMALL))
        with torch.no_grad():
            for name, part in parts.items():
                self.parameters[name].add_(part, alpha=learning_rate * scale)


@dataclass
class SFRon(Tuning):
    """Trains on the retain set with ascents on the forget set in between, of which slow weights keep a part.

    The steepest descent towards retraining, with distances measured by what the retain set makes of them, is an ascent
    on the forget set that the inverse of the retain set's curvature shapes (section 4 of the paper). It is imitated:
    a masked ascent, some ordinary retain steps that repair what it did to the rest, and slow weights that go a part of
    the way to where these lead. An ascent is a step of its own, outside the optimizer, whose momentum it does not
    touch. (In the authors' program the part is 1, the slow weights are those of the optimizer.)

    Attributes:
        batch_size: rows per device in a batch of either set; that of the model's training if None.
        ascent: what the gradient of an ascent is multiplied with at first, beside the learning rate; it falls to zero
            by a cosine.
        every: an ascent comes before every such round of retain steps.
        inner: retain steps in a round.
        slow: the part of the way that the slow weights go after a round, at most 1.
        weighting: power by which samples of low loss weigh more in an ascent; see `adaptive_weights`.
        threshold: an ascent may change the parameters whose curvature on the forget set is at least so many times that
            on the retain set; 0 for all.
        max_length: an ascent is at most so many times as long as a step that changes every parameter by the learning
            rate.
    """

    name: ClassVar[str] = "sfr_on"
    epochs: float = 2.0
    ascent: float = 25.0
    every: int = 5
    inner: int = 1
    slow: float = 0.9
    weighting: float = 0.5
    threshold: float = 1.0
    max_length: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("ascent", self.ascent)
        check_positive_integer("every", self.every)
        check_positive_integer("inner", self.inner)
        check_share("slow", self.slow)
        check_not_negative("weighting", self.weighting)
        check_not_negative("threshold", self.threshold)
        check_positive("max_length", self.max_length)

    def data(self, request: Request) -> Dataset:
        return request.retain

    def masks(self, request: Request) -> dict[str, torch.Tensor]:
        """Returns where an ascent may change the parameters: masks of 0 and 1, by name."""
        function = AdapterFunction(request.model, CrossEntropy())
        if not self.threshold:
            return function.split(torch.ones_like(function.vector))
        with function.prefix.remembering():
            gone, kept = (mean_fisher(function, request.loader(each)) for each in (request.forget, request.retain))
        chosen = gone >= self.threshold * (kept + _SMALL)
        if not chosen.any():
            raise ValueError(
                f"SFR-on found no parameter whose curvature on the forget set is {self.threshold:g} times that on the "
                "retain set, so nothing would be forgotten: lower `threshold`."
            )
        return function.split(chosen.double())

    def train(self, request: Request) -> Trainer:
        request.model.to(request.training.device)  # type: ignore[arg-type]
        request.model.eval()
        callback = FastSlow(self, request, self.masks(request))
        return request.fit(self.data(request), self.arguments(request), callbacks=[callback])
