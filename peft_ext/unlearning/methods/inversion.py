"""Images that a network takes for its training samples, from the network alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import nn

from ...targets import Alignment
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


def inverted(
    model: nn.Module,
    like: Any,
    collator: Callable[[list[Any]], Mapping[str, Any]],
    key: str,
    labels: Sequence[int],
    steps: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Returns rows of images that a model gives some labels, and whose statistics are those of its batch-norm layers.

    Deep inversion (Yin et al. 2020, "Dreaming to Distill") with the terms of the authors' later program: cross-entropy,
    total variation, length, and distance of mean and variance of the inputs of every batch-norm layer from what it
    keeps; of a model without such layers the others remain. Adam starts from noise with mean and deviation of the
    channels of given images.

    Args:
        model: left in evaluation mode.
        like: rows of images; mean and deviation are those of the first 64, and the first one is what a row holds beside
            image and label.
        collator: makes a batch of rows.
        key: name of the image in a row.
        labels: a class for every image.
        steps: of Adam.
        seed: draws the noise.
    """
    model, norms, row = model.eval(), norms_with_statistics(model), dict(like[0])
    device, alignment = next(model.parameters()).device, Alignment.of(model)
    given = torch.stack([torch.as_tensor(like[place][key]) for place in range(min(len(like), 64))])
    mean, deviation = (part[..., None, None] for part in (given.mean((0, 2, 3)), given.std((0, 2, 3))))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(labels), *given.shape[1:], generator=generator)
    images = (mean + deviation * noise.to(given)).to(device).requires_grad_()
    rows = [{**row, label_key(row): label, key: image} for label, image in zip(labels, images.detach().cpu())]
    arguments, targets = alignment.split(send_to_device(dict(collator(rows)), device))
    optimizer = torch.optim.Adam([images], LEARNING_RATE)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 if 3 * step < 2 * steps else 0.1)
        with _distances(norms) as distances:
            outputs = model(**{**arguments, key: images}).logits
        variation = images.diff(dim=-1).square().mean() + images.diff(dim=-2).square().mean()
        loss = F.cross_entropy(outputs, targets) + _VARIATION * variation + _LENGTH * images.norm(dim=1).mean()
        if distances:
            loss = loss + _STATISTICS * torch.stack(distances).sum()
        (images.grad,) = torch.autograd.grad(loss, [images])
        optimizer.step()
    return [{**row, key: image} for row, image in zip(rows, images.detach().cpu())]
