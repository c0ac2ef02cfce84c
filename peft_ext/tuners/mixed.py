"""Batches in which every row has an adapter of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from peft.tuners.lora.model import _adapter_names_pre_forward_hook, _get_encoder
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..checkpoint.identity import check_finite
from ..generators import Generator
from . import idle
from .coefficients import Container
from .expansion import SharedExpansion, is_plain

BASE = "__base__"
"""PEFT's name for rows that no adapter changes."""


class Pool(Protocol):
    """Adapters of which the layers hold one at a time; see `peft_ext.AdapterPool`."""

    @property
    def held(self) -> str:
        """The one that the layers hold, under its name: the others are equal to it but for their coefficients."""

    def __contains__(self, name: object) -> bool: ...

    def coefficients(self, name: str, container: Container) -> torch.Tensor:
        """The coefficients that an adapter has in the layer of a container."""

    def hold(self, name: str) -> None:
        """Puts an adapter into the layers, in place of the one that they hold."""

    def check_unscaled(self) -> None:
        """Raises a ValueError if the adapter in the layers is scaled: the others, in its place, would be so too."""

    def holding(self, name: str) -> AbstractContextManager[None]:
        """Puts an adapter into the layers for a while."""

    def drop(self, name: str) -> bool:
        """Removes an adapter. Returns whether the layers hold it still, since there is no other to put in its place."""


@dataclass
class Part:
    """The rows of a batch whose adapters have equal generators in a layer, so that one stack holds their weights.

    Attributes:
        rows: their indices, or `None` if it is all of them in their order.
        adapters: the adapter in the layer that stands for that of each row: equal to it but for the coefficients.
        weights: what each generator makes for each row: shape `(rows, *shape)`.
        nbytes: of what is held for this part alone.
    """

    rows: torch.Tensor | None
    adapters: list[str]
    weights: list[torch.Tensor]
    nbytes: int


class MixedBatch:
    """What adapter each row of a batch has, and what has been expanded for it.

    The coefficients of adapters with equal generators are stacked and expanded in one product over all layers of one
    shape. The weights are kept for further passes, up to the budget that `peft_ext.set_expansion_budget` sets; beyond
    it, every layer expands its own at every pass.

    Args:
        names: the adapter of each row, or `BASE`.
        pool: adapters that the layers do not hold.
    """

    def __init__(self, names: Sequence[str], pool: Pool | None = None) -> None:
        self.names = list(names)
        self.pool = pool
        self._room = idle.budget()
        self._parts: dict[nn.Module, list[Part]] = {}
        self._joint: dict[tuple[Generator, tuple[str, ...]], tuple[dict[Container, int], torch.Tensor]] = {}
        self._read: list[tuple[list[tuple[str, Container]], slice, torch.Tensor]] = []

    def check(self, x: torch.Tensor) -> None:
        """Raises a ValueError if there is not one name for each input."""
        if len(x) != len(self.names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(self.names)} and {len(x)} respectively."
            )

    @torch.compiler.disable
    def parts(self, layer: Any) -> list[Part]:
        """What the rows need in a layer. A row that the layer leaves as it is, is in no part."""
        kept = self._parts.get(layer)
        if kept is not None and not self._is_trained(layer):
            return kept
        groups: dict[tuple[Generator, ...], dict[str, str]] = {}
        for name in dict.fromkeys(self.names):
            adapter = self._stands_for(layer, name)
            if adapter is not None:
                generators = tuple(expansion.generator for expansion in layer.expansions[adapter])
                groups.setdefault(generators, {})[name] = adapter
        parts = [self._part(layer, group) for group in groups.values()]
        size = sum(part.nbytes for part in parts)
        if size <= self._room and not any(weights.requires_grad for part in parts for weights in part.weights):
            self._room -= size
            self._parts[layer] = parts
        return parts

    def still_fits(self) -> bool:
        """Whether the layers have the coefficients that were read. (A pool tells its model when its own change.)"""
        for pairs, span, stack in self._read:
            now = [container[adapter][span] for adapter, container in pairs]
            if now[0].device != stack.device or not torch.equal(torch.stack(now), stack):
                return False
        return True

    def _is_trained(self, layer: Any) -> bool:
        """Whether gradients are wanted of coefficients of a layer, which weights that were kept do not lead to."""
        if not torch.is_grad_enabled():
            return False
        adapters = {self._stands_for(layer, name) for name in set(self.names)} - {None}
        return any(layer.container(adapter)[adapter].requires_grad for adapter in adapters)

    def _stands_for(self, layer: Any, name: str) -> str | None:
        """The adapter in a layer that is a row's adapter, or is equal to it but for the coefficients, if any is."""
        if name != BASE and layer.container(name) is None and self.pool is not None and name in self.pool:
            name = self.pool.held
        return name if name != BASE and layer.container(name) is not None else None

    def _part(self, layer: Any, group: dict[str, str]) -> Part:
        names = list(group)
        rows = [row for row, name in enumerate(self.names) if name in group]
        order = [names.index(self.names[row]) for row in rows]
        weights, nbytes = [], 0
        for place in range(len(layer.expansions[group[names[0]]])):
            expanded, is_joint = self._expanded(layer, group, place)
            if order != list(range(len(names))):
                expanded, is_joint = expanded[torch.tensor(order, device=expanded.device)], False
            weights.append(expanded)
            nbytes += 0 if is_joint else expanded.numel() * expanded.element_size()
        everything = len(rows) == len(self.names)
        index = None if everything else torch.tensor(rows, device=weights[0].device)
        return Part(index, [group[self.names[row]] for row in rows], weights, nbytes)

    def _expanded(self, layer: Any, group: dict[str, str], place: int) -> tuple[torch.Tensor, bool]:
        """The weights that a generator makes for the adapters of a group, `(adapters, *shape)`; whether jointly."""
        expansions = [layer.expansions[adapter][place] for adapter in group.values()]
        own = [layer.container(adapter) for adapter in group.values()]
        for expansion in expansions:
            expansion.verify()
        generator, span, shape = expansions[0].generator, expansions[0].span, expansions[0].shape
        if self._is_trained(layer):
            return generator.expand(self._stack(group, [own], span))[0].view(len(group), *shape), False
        places, weights = self._joint.get((generator, tuple(group)), ({}, own))
        if own[0] in places:
            return weights[places[own[0]]], True
        columns = self._columns(expansions[0], group, own)
        size = len(columns) * len(group) * generator.size * 4
        if size > self._room:
            columns = [own]
        with torch.inference_mode(False), torch.no_grad():  # the weights must outlive an inference mode
            stack = self._stack(group, columns, span)
            check_finite(stack)
            weights = generator.expand(stack).view(len(columns), len(group), *shape)
        self._remember(group, columns, span, stack)
        if len(columns) == 1:
            return weights[0], False
        self._room -= size
        self._joint[generator, tuple(group)] = {column[0]: i for i, column in enumerate(columns)}, weights
        return weights[next(i for i, column in enumerate(columns) if column[0] is own[0])], True

    def _columns(
        self, expansion: SharedExpansion, group: dict[str, str], own: list[Container]
    ) -> list[list[Container]]:
        """The containers of a group's adapters in all layers that can be expanded together with one, and in that."""
        if expansion.one_vector or any(container is not own[0] for container in own):
            return [own]
        joined = [
            container
            for container in expansion.containers
            if all(adapter in container and is_plain(container[adapter]) for adapter in group.values())
        ]
        alike = {container[adapter].device for container in joined for adapter in group.values()}
        return [[container] * len(group) for container in joined] if own[0] in joined and len(alike) == 1 else [own]

    def _stack(self, group: dict[str, str], columns: list[list[Container]], span: slice) -> torch.Tensor:
        """The coefficients that a generator reads: shape `(layers, adapters, k)`."""
        read = []
        for column in columns:
            for (name, adapter), container in zip(group.items(), column):
                held = container[adapter]
                values = held if name == adapter else self.pool.coefficients(name, container).to(held)  # type: ignore[union-attr]
                read.append(values[span])
        return torch.stack(read).view(len(columns), len(group), -1)

    def _remember(
        self, group: dict[str, str], columns: list[list[Container]], span: slice, stack: torch.Tensor
    ) -> None:
        held = [place for place, (name, adapter) in enumerate(group.items()) if name == adapter]
        adapters = list(group.values())
        pairs = [(adapters[place], column[place]) for column in columns for place in held]
        if pairs:
            self._read.append((pairs, span, stack[:, held].flatten(0, 1)))


@contextmanager
def mixed_batch(tuner: Any, names: Any, copies: int) -> Iterator[None]:
    """Gives every row of the inputs that a model gets in the meantime an adapter of its own.

    Args:
        tuner: the model's; its layers have an attribute `mixed`.
        names: the adapter of each row, or `BASE`.
        copies: how many rows `generate` makes of each, one after the other (beams).

    Raises:
        ValueError: the model is in training mode, or has no such adapter.
        TypeError: `names` is no list.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"`adapter_names` must be a list of names, one for each row, got {type(names).__name__}.")
    if tuner.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    unknown = sorted(set(names) - {BASE} - tuner.peft_config.keys())
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
    encoder = _get_encoder(tuner.model) if copies > 1 else None  # it sees the rows before they are copied
    copied = tuner.mixed_batch_of([name for name in names for _ in range(copies)])
    inside = set(encoder.modules()) if encoder is not None else set()
    as_given = MixedBatch(names, copied.pool) if inside else copied
    handles, layers = [], []
    try:
        for module in tuner.modules():
            batch = as_given if module in inside else copied
            if isinstance(module, tuner.tuner_layer_cls):
                module.mixed = batch
                layers.append(module)
            elif isinstance(module, AuxiliaryTrainingWrapper):
                hook = partial(_adapter_names_pre_forward_hook, adapter_names=batch.names)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for layer in layers:
            layer.mixed = None
        for handle in handles:
            handle.remove()


def copies_of(**generation: Any) -> int:
    """How many rows `generate` makes of each with these arguments."""
    config = generation.get("generation_config")
    numbers = [generation.get(name) or getattr(config, name, None) for name in ("num_beams", "num_return_sequences")]
    return max([number for number in numbers if isinstance(number, int)], default=1)
