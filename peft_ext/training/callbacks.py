"""What is done to parameters or gradients at every step of a training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..checks import check_share
from ..randomness import uniform


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters with `requires_grad`, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns copies of the trainable parameters, by name.

    Taken before a training, they are what unlearning methods call `reference` or `initial`.
    """
    return {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}


@torch.no_grad()
def restore(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Puts copies, such as those of `trainable_state`, back into the parameters of their names."""
    parameters = dict(model.named_parameters())
    for name, value in state.items():
        parameters[name].copy_(value)


class Ridge(TrainerCallback):
    """Adds the gradient of `strength / 2 * |parameters - reference|^2` to that of the loss, before every step.

    Unlike AdamW's weight decay it is part of what is minimised, and pulls to where the training began. With a strength
    for every number it is the penalty of elastic weight consolidation (Kirkpatrick et al. 2017, equation 3). It is
    added after the Trainer has clipped gradients: `max_grad_norm` bounds that of the loss, and not the pull.

    Args:
        model: its trainable parameters are pulled.
        reference: where to, by name.
        strength: how strongly; one number, or tensors of the parameters' shapes by name.
    """

    def __init__(
        self, model: nn.Module, reference: Mapping[str, torch.Tensor], strength: float | Mapping[str, torch.Tensor]
    ) -> None:
        self.strength = strength
        parameters = trainable_parameters(model) if strength else {}
        self.pulled = [
            (parameter, reference[name].clone(), strength[name] if isinstance(strength, Mapping) else strength)
            for name, parameter in parameters.items()
        ]

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter, reference, strength in self.pulled:
            if parameter.grad is None:
                continue
            distance = parameter - reference.to(parameter.device)
            if isinstance(strength, torch.Tensor):
                parameter.grad.add_(distance * strength.to(parameter.device))
            else:
                parameter.grad.add_(distance, alpha=strength)


class DropChanges(TrainerCallback):
    """Drops what a training has changed in some of the parameters' numbers, others in every step.

    For the passes of a step a dropped number has the value that it had when the training began, and it gets no
    gradient; the change of one that is kept is divided by the probability of that, as by dropout. Numbers that are
    rarely kept have little part in what is learned.

    A step that an exception breaks off leaves its dropped values. As a context, which `peft_ext.training.trainer.fit`
    enters, it puts the right ones back at the end.

    Args:
        parameters: the trainable parameters, by name.
        rates: probabilities to be dropped, from 0 to 1, in tensors of the parameters' shapes, by name.
        seed: draws, with a step's number, what is dropped in it, alike in all processes.

    Raises:
        ValueError: a rate is something else.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], rates: Mapping[str, torch.Tensor], seed: int) -> None:
        self.parameters = dict(parameters)
        self.rates = {name: rates[name].to(parameter) for name, parameter in parameters.items()}
        for name, rate in self.rates.items():
            if not ((rate >= 0) & (rate <= 1)).all():
                raise ValueError(f"`rates` must be from 0 to 1, got others for {name!r}.")
        self.seed = seed
        self.start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.kept: dict[str, torch.Tensor] = {}  # 0 for what is dropped in this step, and what the others are scaled by
        self.values: dict[str, torch.Tensor] = {}

    def __enter__(self) -> DropChanges:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._restore()

    @torch.no_grad()
    def _restore(self) -> None:
        """Puts the values of before the step back, if it is one."""
        for name, value in self.values.items():
            self.parameters[name].copy_(value)
        self.values = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._restore()  # after a step that ran out of memory, the Trainer may begin again with smaller batches

    @torch.no_grad()
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._restore()
        for name, parameter in self.parameters.items():
            rate, start = self.rates[name].to(parameter), self.start[name].to(parameter)
            drawn = (uniform(self.seed, ("drop changes", name, state.global_step), rate.numel()) + 1) / 2
            stays = drawn.view(rate.shape).to(rate) >= rate
            self.kept[name] = torch.where(stays & (rate < 1), 1 / (1 - rate), 0)
            self.values[name] = parameter.clone()
            parameter.copy_(start + (parameter - start) * self.kept[name])

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._restore()
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                parameter.grad.mul_(self.kept[name])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._restore()  # a training that is stopped while it accumulates gradients makes no optimizer step


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
