"""A ledger kept since the training, as a method to compare."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from torch import nn
from torch.utils.data import ConcatDataset

from ...checks import check_positive_integer
from ..derivatives.data import Chain, Loader, check_sets
from ..derivatives.quadratic import DRAWS, MEMORY
from ..ledger import RETAIN_TOLERANCE, UnlearningLedger, check_options
from ..ledger_lock import on_main
from .base import Request, Served, UnlearningMethod, UnlearningReport


class _SharedFolder:
    """A temporary folder of the main process, which the others know by its name.

    Attributes:
        name: its path.
    """

    def __init__(self) -> None:
        self._own: TemporaryDirectory | None = None
        self.name: str = on_main(self._make)

    def _make(self) -> str:
        self._own = TemporaryDirectory()
        return self._own.name

    def __enter__(self) -> _SharedFolder:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        if kind is None:
            PartialState().wait_for_everyone()
        if self._own is not None:
            self._own.cleanup()


@dataclass
class Ledger(UnlearningMethod):
    """Takes one damped Newton step from the forget set alone, with a ledger that `prepare` writes.

    `unlearn` deletes the ledger, and so does `fit`, which writes one from both sets and then serves the request. A
    program keeps its own; see `UnlearningLedger`.

    Attributes:
        damping: ridge on the curvature, in units of its mean; chosen by trial deletions if None.
        retain_tolerance: how far those may raise the loss of what remains, in nats per target.
        draws: random vectors a sample that estimate the curvature; None for the exact one.
        memory: bytes for matrices.
        batch_size: rows per device in a batch of a request; that of the model's training if None.
    """

    name: ClassVar[str] = "ledger"
    damping: float | None = None
    retain_tolerance: float = RETAIN_TOLERANCE
    draws: int | None = DRAWS
    memory: float = MEMORY
    batch_size: int | None = None
    _kept: tuple[Request, _SharedFolder, UnlearningLedger] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        check_options(self.damping, self.retain_tolerance, self.draws, self.memory)
        if self.batch_size is not None:
            check_positive_integer("batch_size", self.batch_size)

    def prepare(self, request: Request) -> None:
        """Writes the ledger of the trained model."""
        request.model.to(request.training.device)  # type: ignore[arg-type]
        request.model.eval()
        everything: ConcatDataset = ConcatDataset([request.retain, request.forget])
        folder, loader = _SharedFolder(), request.shared_loader(everything, self.batch_size)
        self._kept = request, folder, self._written(folder.name, request.model, loader, request.initial, request.ridge)

    def unlearn(self, request: Request) -> UnlearningReport:
        if self._kept is None or self._kept[0] is not request:
            self.prepare(request)
        assert self._kept is not None
        (_, folder, ledger), self._kept = self._kept, None
        start = time.perf_counter()
        with folder:
            return self._served(ledger, request.model, request.shared_loader(request.forget, self.batch_size), start)

    def fit(
        self,
        model: nn.Module,
        retain: Loader,
        forget: Loader,
        *,
        reference: Mapping[str, torch.Tensor] | None = None,
        ridge: float = 0.0,
    ) -> UnlearningReport:
        start = time.perf_counter()
        check_sets(retain, forget)
        with _SharedFolder() as folder:
            ledger = self._written(folder.name, model, Chain([retain, forget]), reference, ridge)
            return self._served(ledger, model, forget, start)

    def _written(
        self, folder: str, model: nn.Module, data: Loader, reference: Mapping[str, torch.Tensor] | None, ridge: float
    ) -> UnlearningLedger:
        return UnlearningLedger.create(
            folder,
            model,
            data,
            damping=self.damping,
            retain_tolerance=self.retain_tolerance,
            ridge=ridge,
            reference=reference,
            draws=self.draws,
            memory=self.memory,
        )

    def _served(self, ledger: UnlearningLedger, model: nn.Module, forget: Loader, start: float) -> UnlearningReport:
        learned = len(ledger)
        deletion = ledger.forget(model, forget)
        return UnlearningReport(
            self.name,
            ledger.parameters,
            shift=deletion.shift,
            seconds=time.perf_counter() - start,
            ledger=Served(deletion.samples, learned, ledger.damping, ledger.shortfalls),
        )
