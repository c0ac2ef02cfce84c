"""SalUn: random labels on the salient parameters (Fan et al., "SalUn: Empowering Machine Unlearning via Gradient-based
Weight Saliency", ICLR 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from accelerate.utils import send_to_device
from transformers import Trainer

from ...checks import check_share
from ...targets import IGNORED, Alignment
from ...training.callbacks import KeepMasked, trainable_parameters
from ...training.modes import check_dependence
from .base import Request
from .random_labels import RandomLabels


def forget_gradient(request: Request) -> dict[str, torch.Tensor]:
    """Returns the gradient of the sum of the losses of the forget set, by parameter, in single precision at least.

    Every process goes through the whole set.
    """
    parameters = trainable_parameters(request.model)
    request.model.eval()
    device, alignment = next(iter(parameters.values())).device, Alignment.of(request.model)
    # In half precision a sum over many batches would stand still, or be infinite.
    gradient = {
        name: torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
        for name, parameter in parameters.items()
    }
    for batch in request.loader(request.forget):
        batch = send_to_device(batch, device)
        outputs = request.model(**batch)
        # The model's loss is a mean over the targets of the batch.
        count = int(alignment.pair(outputs, batch["labels"])[1].ne(IGNORED).sum())
        if not count:
            continue
        check_dependence(outputs.loss, sum(map(torch.numel, parameters.values())))
        found = torch.autograd.grad(outputs.loss, list(parameters.values()), allow_unused=True)
        for name, part in zip(parameters, found):
            if part is not None:
                gradient[name] += count * part.to(gradient[name].dtype)
    return gradient


def saliency_masks(gradient: dict[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
    """Returns masks that are True where a parameter may change (equation 4 of the paper).

    Args:
        gradient: by parameter.
        share: how many of all numbers are chosen, at least one: those with the largest absolute gradient.
    """
    size = torch.cat([part.abs().flatten() for part in gradient.values()])
    chosen = torch.zeros_like(size, dtype=torch.bool)
    chosen[size.argsort(descending=True, stable=True)[: max(1, round(share * len(size)))]] = True
    parts = chosen.split([part.numel() for part in gradient.values()])
    return {name: part.view(gradient[name].shape) for name, part in zip(gradient, parts)}


@dataclass
class SalUn(RandomLabels):
    """Random labels that change only the parameters on which the loss of the forget set depends most.

    Attributes:
        share: how many of the trainable numbers may change, at least one; the paper's threshold is the median.
    """

    name: ClassVar[str] = "salun"
    share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("share", self.share)

    def train(self, request: Request) -> Trainer:
        request.model.to(request.training.device)  # type: ignore[arg-type]
        data = self.data(request)
        masks = saliency_masks(forget_gradient(request), self.share)
        parameters = trainable_parameters(request.model)
        # Masked gradients too, for those outside would use up the bound on the gradient's norm.
        hooks = [
            parameter.register_hook(lambda gradient, mask=masks[name]: gradient * mask)
            for name, parameter in parameters.items()
        ]
        try:
            callbacks = [KeepMasked(parameters, masks)]
            return request.fit(data, self.arguments(request), callbacks=callbacks)
        finally:
            for hook in hooks:
                hook.remove()
