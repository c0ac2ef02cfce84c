"""Training on given values of all outputs at a target, such as a distribution of labels, beside rows with labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import Dataset

from ...targets import IGNORED, Alignment
from ...training.callbacks import trainable_parameters
from ...training.modes import check_dependence
from ...training.trainer import EvaluationTrainer
from .base import Request

_WANTED, _WHICH = "wanted_outputs", "has_wanted_outputs"  # among the arguments of a batch; of no model


@torch.no_grad()
def outputs_at_targets(request: Request, dataset: Dataset) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns what a model says at the targets of every sample, `(targets, c)` in float32, and these, `(targets,)`.

    Every process goes through the whole set.
    """
    model = request.model.eval()
    device, alignment, found = next(model.parameters()).device, Alignment.of(model), []
    for batch in request.loader(dataset):
        arguments, labels = alignment.split(send_to_device(batch, device))
        outputs, targets = alignment.pair(model(**arguments), labels)
        present = targets != IGNORED
        found += [(each[at].float().cpu(), own[at].cpu()) for each, own, at in zip(outputs, targets, present)]
    return found


class SoftTargets(Dataset):
    """Rows, each with what is wanted of all outputs at its targets.

    Args:
        rows: as the request's collator takes them.
        wanted: `(targets, c)` for each row; None where the labels of the rows say what is wanted.
    """

    def __init__(self, rows: Any, wanted: Sequence[torch.Tensor] | None = None) -> None:
        self.rows, self.wanted = rows, wanted

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, torch.Tensor | None]:
        return self.rows[index], None if self.wanted is None else self.wanted[index]


class SoftCollator:
    """Makes a batch of the rows of `SoftTargets`, for a `SoftTrainer`.

    Args:
        collator: makes a batch of plain rows.
    """

    def __init__(self, collator: Callable[[list[Any]], Mapping[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, items: list[tuple[Any, torch.Tensor | None]]) -> dict[str, Any]:
        rows, wanted = zip(*items)
        batch = dict(self.collator(list(rows)))
        batch[_WHICH] = torch.tensor([each is not None for each in wanted])
        present = [each for each in wanted if each is not None]
        return batch | ({_WANTED: torch.cat(present)} if present else {})


class SoftTrainer(EvaluationTrainer):
    """Trains on rows of `SoftTargets`, with a cross-entropy to what is wanted or with half the squared distance to it.

    Args:
        loss: `"cross_entropy"` or `"squared_error"`.
        *args, **kwargs: what a Trainer takes.
    """

    def __init__(self, loss: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss = loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        inputs = dict(inputs)
        own, which = inputs.pop(_WANTED, None), inputs.pop(_WHICH)
        alignment = Alignment.of(model)
        arguments, labels = alignment.split(inputs)
        found = model.eval()(**arguments)
        outputs, targets = alignment.pair(found, labels)
        check_dependence(outputs, sum(parameter.numel() for parameter in trainable_parameters(model).values()))
        present = targets != IGNORED
        outputs = outputs.float() if outputs.dtype.itemsize < 4 else outputs
        wanted = F.one_hot(targets.clamp(min=0), outputs.shape[-1]).to(outputs)
        if self.loss == "cross_entropy":
            smoothing = self.args.label_smoothing_factor
            wanted = (1 - smoothing) * wanted + smoothing / wanted.shape[-1]
        if own is not None:
            wanted[present & which[:, None]] = own.to(outputs)
        total = self.values(outputs[present], wanted[present], targets[present]).sum()
        # As the loss of the model itself is divided: the Trainer divides what does not know the whole step's targets.
        whole = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        loss = total / (num_items_in_batch if whole else present.sum().clamp(min=1))
        if whole and self.args.average_tokens_across_devices:  # those of all devices, over which gradients are averaged
            loss = loss * (self.args.n_gpu if self.args.n_gpu > 1 else self.accelerator.num_processes)
        return (loss, found) if return_outputs else loss

    def values(self, outputs: torch.Tensor, wanted: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Returns the losses of targets, `(targets,)`.

        Args:
            outputs, wanted: `(targets, c)`.
            labels: of the rows, whatever is wanted, `(targets,)`.
        """
        if self.loss == "cross_entropy":
            return -(wanted * outputs.log_softmax(-1)).sum(-1)
        return 0.5 * (outputs - wanted).square().sum(-1)
