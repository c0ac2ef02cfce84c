"""CovarNav: wrong labels within the directions that what stays does not need (Abbasi et al., "CovarNav: Machine
Unlearning via Model Inversion and Covariance Navigation", 2023)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import ConcatDataset, Dataset
from transformers import Trainer, TrainingArguments

from ...checks import check_choice, check_positive, check_positive_integer, check_share
from ...training.callbacks import trainable_parameters
from ...training.projection import Projection, ProjectUpdates
from ..derivatives.data import Loader, sample_keys
from ..derivatives.function import AdapterFunction
from ..derivatives.losses import CrossEntropy
from ..derivatives.quadratic import DRAWS, MEMORY, RowSum, SampledQuadratic, smaller_form
from .base import Request, Tuned, UnlearningReport
from .soft_targets import SoftCollator, SoftTargets, SoftTrainer, outputs_at_targets
from .tuning import Tuning

_PROTECTED = ("ledger", "retain", "inverted")


def without_own_label(outputs: torch.Tensor, targets: torch.Tensor, soft: bool) -> torch.Tensor:
    """Returns a distribution of labels without the target for every output, `(targets, c)`.

    Args:
        outputs: `(targets, c)`.
        targets: `(targets,)`.
        soft: what the model says of the other labels; otherwise the most probable of them alone.
    """
    others = outputs.scatter(-1, targets[:, None], -torch.inf)
    return others.softmax(-1) if soft else nn.functional.one_hot(others.argmax(-1), outputs.shape[-1]).to(outputs)


@dataclass
class CovarNav(Tuning):
    name: ClassVar[str] = "covarnav"
    epochs: float = 5.0
    protect: str = "ledger"
    energy: float = 0.95
    soft: bool = False
    draws: int | None = DRAWS
    memory: float = MEMORY
    images: int = 50
    inversion_steps: int = 200
    _kept: tuple[Request, SampledQuadratic] | None = field(default=None, init=False, repr=False, compare=False)

    def _function(self, request: Request) -> AdapterFunction:
        request.model.to(request.training.device)
        request.model.eval()
        return AdapterFunction(request.model, CrossEntropy(), memory=self.memory / 4)

    def prepare(self, request: Request) -> None:
        if self.protect != "ledger":
            return
        function = self._function(request)
        everything: Any = ConcatDataset([request.retain, request.forget])
        loader = request.loader(everything)
        form, need = smaller_form(function.size, len(everything) * function.rows_of_a_sample(loader, self.draws))
        with function.prefix.remembering():
            kept, _ = SampledQuadratic.of(function, loader, form, function.flatten(request.initial), request.ridge, self.draws)
        self._kept = request, kept

    def protected(self, request: Request) -> Projection:
        function = self._function(request)
        if self.protect == "ledger":
            forget = request.loader(request.forget)
            remaining, _ = self._kept[1].without(function, forget, Counter(sample_keys(forget)))
            terms, form = remaining.terms, remaining.form
        else:
            rows = request.loader(request.retain)
            samples = len(request.retain)
            form, need = smaller_form(function.size, samples * function.rows_of_a_sample(rows, self.draws))
            sums = RowSum(form, function)
            for found in function.linearise(rows, self.draws):
                sums.add(found.rows)
            terms = sums.total()
        if form == "kernel":
            return Projection(terms.flatten(0, 1).to(function.device), self.energy)
        return Projection(terms.to(function.device), self.energy, symmetric=True)

    def data(self, request: Request) -> Dataset:
        wanted = [without_own_label(*each, self.soft) for each in outputs_at_targets(request, request.forget)]
        return SoftTargets(request.forget, wanted)

    def train(self, request: Request) -> Trainer:
        if self.protect == "ledger" and (self._kept is None or self._kept[0] is not request):
            self.prepare(request)
        from dataclasses import replace
        projection = self.protected(request)
        soft = replace(request, collator=SoftCollator(request.collator))
        callback = ProjectUpdates(trainable_parameters(request.model), projection)
        cbs = [callback] + getattr(self, "extra", [])
        return soft.fit(self.data(request), self.arguments(request), partial(SoftTrainer, "cross_entropy"), callbacks=cbs)
