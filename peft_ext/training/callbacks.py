"""What is done to parameters or gradients at every step of a training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..checks import check_share


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters with `requires_grad`, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns copies of the trainable parameters, by name.

    Taken before a training, they are what unlearning methods call `reference` or `initial`.
    """
    return {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}


class Ridge(TrainerCallback):
    """Adds the gradient of `strength / 2 * |parameters - reference|^2` to that of the loss, before every step.

    Unlike AdamW's weight decay it is part of what is minimised, and pulls to where the training began.

    Args:
        model: its trainable parameters are pulled.
        reference: where to, by name.
        strength: how strongly.
    """

    def __init__(self, model: nn.Module, reference: Mapping[str, torch.Tensor], strength: float) -> None:
        self.strength = strength
        parameters = trainable_parameters(model) if strength else {}
        self.pairs = [(parameter, reference[name].clone()) for name, parameter in parameters.items()]

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter, reference in self.pairs:
            if parameter.grad is not None:
                parameter.grad.add_(parameter - reference.to(parameter.device), alpha=self.strength)


class StopAfter(TrainerCallback):
    """Ends a training after a share of its planned optimizer steps.

    The learning rate is cut there: it follows the schedule of the whole training, unlike that of a training that was
    planned with fewer steps.

    Args:
        share: above 0 and at most 1; the number of steps is rounded, and at least 1.

    Raises:
        ValueError: `share` is something else.
    """

    def __init__(self, share: float) -> None:
        check_share("share", share)
        self.share = share

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= max(1, round(self.share * state.max_steps)):
            control.should_training_stop = True


class KeepMasked(TrainerCallback):
    """Puts parameters outside a mask back after every step: weight decay and momentum must not move them either.

    Args:
        parameters: the trainable parameters, by name.
        masks: tensors of the parameters' shapes, by name: True where a parameter may change.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], masks: dict[str, torch.Tensor]) -> None:
        self.kept = [(parameter, masks[name], parameter.detach().clone()) for name, parameter in parameters.items()]

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter, mask, value in self.kept:
            parameter.copy_(torch.where(mask, parameter, value))
