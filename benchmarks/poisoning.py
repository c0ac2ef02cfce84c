"""An attack on learners of tasks in turn: noise on the last task's images that makes them forget the earlier tasks.

BrainWash (Abbasi et al., CVPR 2024, arXiv 2311.11995), for `brainwash.py`. Labels stay right, and no pixel changes by
more than a bound.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import TrainerCallback

from peft_ext.adapters.continual import TaskMemory
from peft_ext.randomness import uniform
from peft_ext.training.callbacks import Ridge, restore, trainable_parameters, trainable_state
from peft_ext.training.projection import ProjectUpdates
from peft_ext.unlearning.methods.inversion import inverted
from recipes.continual.learners import Learner, Turns
from recipes.support.arguments import UserError

Row = dict[str, Any]
PIXELS = "pixel_values"
NOISES = {
    "random": "no attack, what attacks start from, uniform up to the bound",
    "real": "an attacker with training images of earlier tasks",
    "aware": "the same, who knows how the learner protects its steps",
    "inverted": "an attacker with images inverted from the weights",
}


@dataclass
class AttackArguments:
    """How the noise is made."""

    steps: int = field(default=60, metadata={"help": "Steps of the attack."})
    inner_steps: int = field(default=1, metadata={"help": "Steps of the learner that the attack looks ahead."})
    inner_rate: float = field(
        default=0.01, metadata={"help": "Length of these steps: root mean square of what a trained number moves by."}
    )
    proxies: int = field(default=32, metadata={"help": "Images of each earlier task that the attacker has or makes."})
    inversion_steps: int = field(default=100, metadata={"help": "Steps in which images are inverted."})

    def check(self) -> None:
        """Raises a UserError for what is not above 0."""
        for name, value in vars(self).items():
            if value <= 0:
                raise UserError(f"{name} is {value:g}; it must be above 0")

    def settings(self, noise: str) -> dict[str, Any]:
        """Returns what noise of a kind depends on."""
        if noise in ("none", "random"):
            return {}
        return {name: value for name, value in vars(self).items() if noise == "inverted" or name != "inversion_steps"}


def loss_after(
    model: nn.Module,
    batch: Mapping[str, Any],
    images: torch.Tensor,
    proxies: Mapping[str, Any],
    rate: float,
    steps: int = 1,
    callbacks: Sequence[TrainerCallback] = (),
) -> torch.Tensor:
    """Returns the loss on some samples that steps of gradient descent on images would lead to, differentiable in those.

    Args:
        model: in evaluation mode; its parameters stay as they are.
        batch: arguments of the model, with `labels`, that the steps are taken on.
        images: in place of those in it.
        proxies: arguments for the samples.
        rate: length of a step, the root mean square of what a number moves by. Adam's steps have such a length too,
            whatever that of the gradient is.
        steps: how many.
        callbacks: protect the steps as a training would, `Ridge` and `ProjectUpdates`; others have no part in it.
    """
    values: dict[str, torch.Tensor] = dict(trainable_parameters(model))
    pulls = [pull for callback in callbacks if isinstance(callback, Ridge) for pull in callback.pulled]
    projections = [callback.projection for callback in callbacks if isinstance(callback, ProjectUpdates)]
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivatives
        for _ in range(steps):
            loss = functional_call(model, values, (), {**batch, PIXELS: images}).loss
            parts = torch.autograd.grad(loss, list(values.values()), create_graph=True)
            if pulls:
                parts = tuple(g + s * (value - to) for g, value, (_, to, s) in zip(parts, values.values(), pulls))
            step = torch.cat([part.flatten() for part in parts])
            step = step / step.square().mean().sqrt()
            for projection in projections:
                step = projection(step.double()).to(step)
            moves = step.split([value.numel() for value in values.values()])
            values = {name: value - rate * move.view_as(value) for (name, value), move in zip(values.items(), moves)}
        return functional_call(model, values, (), dict(proxies)).loss


def attack(
    loss: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    bound: float,
    limits: tuple[float, float],
    steps: int,
    seed: int,
) -> torch.Tensor:
    """Returns images whose noise raises a loss, by steps along the sign of its gradient.

    Args:
        loss: of images.
        images: without noise.
        bound: what is added to a pixel at most.
        limits: lowest and highest value that a pixel can have.
        steps: how many; together they are two and a half times as long as the bound.
        seed: draws the noise that it starts from.
    """
    noise = bound * uniform(seed, ("brainwash", "start"), images.numel()).view_as(images).to(images)
    for _ in range(steps):
        noisy = (images + noise).clamp(*limits).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(noisy), [noisy])
        noise = (noise + 2.5 * bound / steps * gradient.sign()).clamp(-bound, bound)
    return (images + noise).clamp(*limits)


class Victim:
    """A learner that has learned all tasks but the last one, and an attacker who has its weights and the last task.

    With one adapter a task there are no weights that tasks share; the attacker has those of an adapter that was
    fine-tuned on the earlier tasks.

    Args:
        turns: trains and measures.
        learner: how it learns.
        seed: the run's seed.
        stack: holds what the model needs as long as it is used.
    """

    def __init__(self, turns: Turns, learner: Learner, seed: int, stack: ExitStack) -> None:
        self.turns, self.learner, self.training = turns, learner, copy.copy(turns.training)
        self.training.seed = seed
        self.earlier: list[list[Row]] = [list(rows) for rows in turns.problem.train[:-1]]  # type: ignore[call-overload]
        self.last: list[Row] = list(turns.problem.train[-1])  # type: ignore[call-overload]
        self.model, self.memory = turns.model(learner, seed, stack), TaskMemory(**learner.memory)
        fresh = trainable_state(self.model)
        self.before: list[Any] = [self._learn(task, rows)[task] for task, rows in enumerate(self.earlier)]
        self.weights = trainable_state(self.model)
        self.start = fresh if learner.kind == "separate" else self.weights
        self._proxies: dict[bool, Row] = {}

    def _learn(self, task: int, rows: Any) -> list[Any]:
        return self.turns.learn(self.model, self.learner, self.memory, task, self.training, rows)

    def _batch(self, rows: list[Row]) -> Row:
        return send_to_device(dict(self.turns.problem.collator(rows)), self.training.device)

    def proxies(self, invert: bool, args: AttackArguments) -> Row:
        """Returns samples that stand in for the earlier tasks, training images or inverted ones, as a batch."""
        if invert in self._proxies:
            return self._proxies[invert]
        found, seed, collator = [], self.training.seed, self.turns.problem.collator
        for task, rows in enumerate(self.earlier):
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
            chosen = [rows[place] for place in order[: args.proxies]]
            if invert:
                own = sorted({row["labels"] for row in rows})
                labels = [own[place % len(own)] for place in range(args.proxies)]
                like = [{**row, "task": task} for row in self.last]
                chosen = inverted(self.model, like, collator, PIXELS, labels, args.inversion_steps, seed + task)
            found += chosen
        return self._proxies.setdefault(invert, self._batch(found))

    def images(self, noise: str, bound: float, args: AttackArguments) -> torch.Tensor:
        """Returns the last task's images with noise of a kind, `(n, channels, height, width)`."""
        restore(self.model, self.weights)
        images = _images(self.last).to(self.training.device)
        limits = (float(images.min()), float(images.max()))
        batch, proxies = self._batch(self.last), self.proxies(noise == "inverted", args)
        callbacks = self.memory.callbacks(self.model) if noise == "aware" else []

        def loss(images: torch.Tensor) -> torch.Tensor:
            return loss_after(self.model, batch, images, proxies, args.inner_rate, args.inner_steps, callbacks)

        steps = 0 if noise == "random" else args.steps
        return attack(loss, images, bound * (limits[1] - limits[0]), limits, steps, self.training.seed).cpu()

    def measure(self, noise: str, bound: float, args: AttackArguments) -> Row:
        """Learns the last task from images with noise, and returns what has become of all tasks."""
        clean = _images(self.last)
        images = clean if noise == "none" else self.images(noise, bound, args)
        restore(self.model, self.start)
        *after, last = self._learn(len(self.earlier), [{**row, PIXELS: each} for row, each in zip(self.last, images)])
        found = {
            "noise_size": float((images - clean).square().mean().sqrt() / (clean.max() - clean.min())),
            "last_task": last,
        }
        if self.learner.kind == "separate":  # no training has touched the other adapters
            return {**found, "backward_transfer": 0.0, "before": None, "after": None}
        transfer = mean(now - then for then, now in zip(self.before, after))
        return {**found, "backward_transfer": transfer, "before": self.before, "after": after}


def _images(rows: list[Row]) -> torch.Tensor:
    return torch.stack([torch.as_tensor(row[PIXELS]) for row in rows])
