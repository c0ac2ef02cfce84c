"""The linearised solvers, as methods to compare."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from accelerate import Accelerator
from torch.utils.data import Dataset

from .base import Request, UnlearningMethod
from .solver import NTKUnlearner


def prepared_loader(request: Request, dataset: Dataset, batch_size: int | None) -> Any:
    """The rows of a set, of which each process reads its share."""
    return Accelerator().prepare_data_loader(request.loader(dataset, batch_size))


@dataclass
class FastNTK(UnlearningMethod):
    """The published closed form, linearised at the initial parameters.

    Attributes:
        form: "parameter", "kernel" or "auto"; see `NTKUnlearner`, as for the others.
        damping: The ridge.
        memory: Bytes for matrices.
        batch_size: Rows per device in a batch; that of the model's training if None.
    """

    name: ClassVar[str] = "fast_ntk"
    form: str = "auto"
    damping: float = 0.01
    memory: float = 4e9
    batch_size: int | None = None

    def unlearn(self, request: Request) -> list[str]:
        """Solve."""
        request.model.to(request.training.device)  # type: ignore[arg-type]
        options: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del options["batch_size"]
        if isinstance(self, GaussNewton):
            options["weight_decay"] = request.ridge
        method: Literal["fast_ntk", "gauss_newton"] = "gauss_newton" if isinstance(self, GaussNewton) else "fast_ntk"
        unlearner = NTKUnlearner(request.model, method=method, reference=request.initial, **options)
        loaders = [prepared_loader(request, part, self.batch_size) for part in (request.retain, request.forget)]
        report = unlearner.fit(*loaders)
        request.model.eval()
        kept = sum(step.accepted for step in report.steps)
        steps = f"{kept} of {len(report.steps)} steps kept, " if report.steps else ""
        return [f"{steps}{report.form} form, curvature {report.curvature}", *report.notes]


@dataclass
class GaussNewton(FastNTK):
    """Damped Gauss-Newton steps on the retain set from the trained parameters.

    Attributes:
        damping: Its first value, in units of the mean curvature.
        max_steps: At most as many steps.
        tolerance: Stops when a step lowers the objective by less, relative to its value.
        retain_tolerance: How far above its start the retain loss may end, in nats.
        draws: Random vectors a sample that estimate the curvature; None for the exact one.
        estimator: How they are drawn.
        curvature_samples: Retain samples that estimate it; None for all.
    """

    name: ClassVar[str] = "gauss_newton"
    damping: float = 0.3
    max_steps: int = 10
    tolerance: float = 1e-3
    retain_tolerance: float = 0.05
    draws: int | None = 3
    estimator: str = "signs"
    curvature_samples: int | None = None
