"""Images that a network with batch-norm takes for its training samples, from the network alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import nn

from ...targets import Alignment
from .base import Request
from .relabelling import label_key

LEARNING_RATE = 0.1
"""Of Adam on normalised pixels, for the first two thirds of the steps; a tenth afterwards."""

# Weights beside the cross-entropy, in the proportions of the program of "BrainWash" (Abbasi et al., CVPR 2024).
_VARIATION, _LENGTH, _STATISTICS = 1e-3, 0.1, 0.1


def norms_with_statistics(model: nn.Module) -> list[nn.Module]:
    """Returns the batch-norm layers of a model that keep running statistics."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]


@contextmanager
def _distances(norms: Sequence[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Collects how far the inputs of batch-norm layers are, in mean and variance, from the layers' statistics."""
    found: list[torch.Tensor] = []

    def look(norm: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        axes = [axis for axis in range(inputs[0].dim()) if axis != 1]
        mean, variance = inputs[0].mean(axes), inputs[0].var(axes, correction=0)
        found.append((mean - norm.running_mean).norm() + (variance - norm.running_var).norm())

    hooks = [norm.register_forward_pre_hook(look) for norm in norms]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def inverted(request: Request, key: str, labels: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """Returns rows of images that a model gives some labels, and whose statistics are those of its batch-norm layers.

    Deep inversion (Yin et al. 2020, "Dreaming to Distill") with the terms of the authors' later program: cross-entropy,
    total variation, length, and distance of mean and variance of the inputs of every batch-norm layer from what it
    keeps. Adam starts from noise with mean and deviation of the forget images' channels; the training's seed draws it.

    Args:
        request: with the model, and rows to forget that say how a row looks.
        key: name of the image in a row.
        labels: a class for every image.
        steps: of Adam.
    """
    model, norms, row = request.model.eval(), norms_with_statistics(request.model), dict(request.forget[0])
    device, alignment = next(model.parameters()).device, Alignment.of(model)
    forget = torch.stack([torch.as_tensor(each[key]) for each in map(request.forget.__getitem__, range(_few(request)))])
    mean, deviation = (part[..., None, None] for part in (forget.mean((0, 2, 3)), forget.std((0, 2, 3))))
    generator = torch.Generator().manual_seed(request.training.seed)
    noise = torch.randn(len(labels), *forget.shape[1:], generator=generator)
    images = (mean + deviation * noise.to(forget)).to(device).requires_grad_()
    rows = [{**row, label_key(row): label, key: image} for label, image in zip(labels, images.detach().cpu())]
    arguments, targets = alignment.split(send_to_device(dict(request.collator(rows)), device))
    optimizer = torch.optim.Adam([images], LEARNING_RATE)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 if 3 * step < 2 * steps else 0.1)
        with _distances(norms) as distances:
            outputs = model(**{**arguments, key: images}).logits
        variation = images.diff(dim=-1).square().mean() + images.diff(dim=-2).square().mean()
        loss = F.cross_entropy(outputs, targets) + _VARIATION * variation + _LENGTH * images.norm(dim=1).mean()
        (images.grad,) = torch.autograd.grad(loss + _STATISTICS * torch.stack(distances).sum(), [images])
        optimizer.step()
    return [{**row, key: image} for row, image in zip(rows, images.detach().cpu())]


def _few(request: Request) -> int:
    return min(len(request.forget), 64)  # type: ignore[arg-type]
