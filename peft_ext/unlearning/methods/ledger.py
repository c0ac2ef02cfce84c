"""A ledger kept since the training, as a method to compare."""

from __future__ import annotations

from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import ClassVar

from torch.utils.data import ConcatDataset

from ..ledger import UnlearningLedger
from .base import Request, UnlearningMethod
from .gauss_newton import prepared_loader


@dataclass
class Ledger(UnlearningMethod):
    """One damped Newton step from the forget set alone, with a ledger that `prepare` writes and `unlearn` deletes.

    A program keeps its own: see `UnlearningLedger`, as for the options.

    Attributes:
        damping: Ridge on the curvature, in units of its mean; chosen by trial deletions if None.
        retain_tolerance: How far those may raise the loss of what remains, in nats.
        draws: Random vectors a sample that estimate the curvature; None for the exact one.
        memory: Bytes for matrices.
        batch_size: Rows per device in a batch; that of the model's training if None.
    """

    name: ClassVar[str] = "ledger"
    damping: float | None = None
    retain_tolerance: float = 0.05
    draws: int | None = 3
    memory: float = 4e9
    batch_size: int | None = None
    _kept: tuple[Request, TemporaryDirectory, UnlearningLedger] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    def prepare(self, request: Request) -> None:
        """Write the ledger of the trained model."""
        request.model.to(request.training.device)  # type: ignore[arg-type]
        everything: ConcatDataset = ConcatDataset([request.retain, request.forget])
        folder = TemporaryDirectory()
        ledger = UnlearningLedger.create(
            folder.name,
            request.model,
            prepared_loader(request, everything, self.batch_size),
            damping=self.damping,
            retain_tolerance=self.retain_tolerance,
            weight_decay=request.ridge,
            reference=request.initial,
            draws=self.draws,
            memory=self.memory,
        )
        self._kept = request, folder, ledger

    def unlearn(self, request: Request) -> list[str]:
        """Serve the request."""
        if self._kept is None or self._kept[0] is not request:
            self.prepare(request)
        assert self._kept is not None
        (_, folder, ledger), self._kept = self._kept, None
        with folder:
            learned = len(ledger)
            deletion = ledger.forget(request.model, prepared_loader(request, request.forget, self.batch_size))
        request.model.eval()
        taken = f"{deletion.samples:,} of {learned:,} samples taken off"
        return [f"{taken}, damping {ledger.damping:g}; the retain set was not read"]
