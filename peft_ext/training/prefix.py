"""The part of a network that nothing can change is computed once a sample."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from .batch import Batch

_FEATURES = "features of the frozen prefix"  # among the tensors of a batch; no argument of any model
_Found = TypeVar("_Found")


class FrozenPrefix:
    """Blocks of a network that come before everything that can change: what they give is kept sample by sample.

    The blocks are the first ones of an `nn.ModuleList`, each of which takes a tensor first, which requires no gradient,
    and gives a tensor. What is kept is the input of the last such block, the first one that a change may go through.
    Networks where that does not work, or would change a bit of the outputs, are computed whole, and so are batches with
    arguments that are neither a tensor of samples nor a plain value, such as `interpolate_pos_encoding=True`.

    Args:
        model: in eval mode, with gradients for what can change alone, whenever this is used.
        outputs: gives the model's outputs for a batch, one tensor or more, by way of `call`.
        memory: bytes that may be kept.
    """

    def __init__(self, model: nn.Module, outputs: Callable[[Batch], Sequence[torch.Tensor]], memory: float) -> None:
        self.model = model
        self.outputs = outputs
        self.memory = memory
        self.blocks: list[nn.Module] | None = []  # None: not looked for yet
        self._kept: dict[bytes, torch.Tensor] = {}
        self._bytes = 0  # of what is kept
        self._inside = False  # a call

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Keeps what the blocks give until the end of the context. What is frozen must not change meanwhile."""
        self.blocks = None
        try:
            yield
        finally:
            self.forget()

    def forget(self) -> None:
        """Gives up what is kept, and keeps nothing more."""
        self.blocks = []
        self._kept.clear()
        self._bytes = 0

    @torch.enable_grad()
    def _find(self, batch: Batch) -> list[nn.Module]:
        lists = [
            list(module)
            for module in self.model.modules()
            if isinstance(module, nn.ModuleList)
            and len(module) > 1
            and not any(parameter.requires_grad for parameter in module[0].parameters())
        ]
        if not lists:
            return []
        inputs: dict[nn.Module, Any] = {}
        order: list[nn.Module] = []
        results: dict[nn.Module, Any] = {}

        def before(block: nn.Module, args: tuple[Any, ...]) -> None:
            order.append(block)
            inputs[block] = args[0] if args else None

        def after(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            results[block] = output

        hooks = [
            hook
            for block in {block for blocks in lists for block in blocks}
            for hook in (block.register_forward_pre_hook(before), block.register_forward_hook(after))
        ]
        try:
            expected = self.outputs(batch)
        finally:
            for hook in hooks:
                hook.remove()

        def frozen(blocks: list[nn.Module]) -> list[nn.Module]:
            """Returns those that can be passed over, and the one behind them."""
            if [block for block in order if block in set(blocks)] != blocks:
                return []  # not one after the other, or one twice
            found = []
            for block in blocks:
                if not isinstance(inputs[block], torch.Tensor) or inputs[block].requires_grad:
                    break
                found.append(block)
                if not isinstance(results[block], torch.Tensor) or results[block].shape != inputs[block].shape:
                    break
            return found if len(found) > 1 else []

        def size(blocks: list[nn.Module]) -> int:
            return sum(parameter.numel() for block in blocks[:-1] for parameter in block.parameters())

        self.blocks = max(map(frozen, lists), key=size, default=[])
        if self.blocks:
            features = inputs[self.blocks[-1]].detach()
            if len(features) == len(batch) and all(map(_equal, self.outputs(_with(batch, features)), expected)):
                return self.blocks
        return []

    def call(self, batch: Batch, function: Callable[[Batch], _Found], remember: bool = False) -> _Found:
        """Calls a function of a batch, with what the blocks give for its samples where that is known.

        Calls nest. The outer one looks the samples up, and its function may compute anything: it may take parts of the
        batch that it gets or map over its tensors. Forward passes of the model are inner ones: they pass over the
        blocks if the batch holds what these give.

        Args:
            batch: the samples.
            function: what is wanted of them. The batch that it gets in an outer call may have one more tensor.
            remember: whether to keep what the blocks give in a forward pass of the whole batch.
        """
        features = batch.tensors.get(_FEATURES)
        if features is not None:
            rest = {name: tensor for name, tensor in batch.tensors.items() if name != _FEATURES}
            with self._passed_over(features):
                return function(Batch(rest, batch.options))
        if self._inside or not is_plain(batch):
            return function(batch)
        self._inside = True
        try:
            batch = self._completed(batch)
            keep = remember and self.blocks and _FEATURES not in batch.tensors
            with self._keeping(batch) if keep else nullcontext():
                return function(batch)
        finally:
            self._inside = False

    def _completed(self, batch: Batch) -> Batch:
        """Returns the batch, with what the blocks give for its samples if that is known."""
        if self.blocks is None:
            self.blocks = self._find(batch.select(slice(0, 1)))
        if not self._kept:
            return batch
        found = [self._kept.get(key) for key in row_keys(batch)]
        known = [features for features in found if features is not None]
        return batch if len(known) < len(found) else _with(batch, torch.stack(known))

    @contextmanager
    def _passed_over(self, features: torch.Tensor) -> Iterator[None]:
        """Makes forward passes take what the blocks give from `features`.

        A network that reads what one of the blocks gives elsewhere, too, finds no number there but the last one's.
        """
        skipped = (self.blocks or [])[:-1]
        before = [block.__dict__.get("forward") for block in skipped]
        unknown = features.new_full((), torch.nan).expand(features.shape)
        for block in skipped:
            found = features if block is skipped[-1] else unknown
            block.forward = lambda *args, found=found, **kwargs: found  # type: ignore[method-assign]
        try:
            yield
        finally:
            for block, forward in zip(skipped, before):
                del block.forward
                if forward is not None:
                    block.forward = forward  # type: ignore[method-assign]

    @contextmanager
    def _keeping(self, batch: Batch) -> Iterator[None]:
        """Makes a forward pass of a batch keep what the blocks give for its samples."""
        assert self.blocks

        def keep(block: nn.Module, args: tuple[Any, ...]) -> None:
            for key, features in zip(row_keys(batch), args[0].detach()):
                self._keep(key, features)

        hook = self.blocks[-1].register_forward_pre_hook(keep)
        try:
            yield
        finally:
            hook.remove()

    def _keep(self, key: bytes, features: torch.Tensor) -> bool:
        """Keeps what the blocks give for a sample if there is room, and returns whether that is kept now."""
        if key not in self._kept and self._bytes + features.nbytes <= self.memory:
            self._kept[key] = features.clone()
            self._bytes += features.nbytes
        return key in self._kept


def _with(batch: Batch, features: torch.Tensor) -> Batch:
    return Batch({**batch.tensors, _FEATURES: features}, batch.options)


def _equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Returns whether two tensors agree to the bit; a loss without targets is no number."""
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True)


def is_plain(batch: Batch) -> bool:
    """Returns whether all options of a batch are plain values, which can be compared and hashed."""
    return all(value is None or isinstance(value, (bool, int, float, str)) for value in batch.options.values())


def row_keys(batch: Batch) -> list[bytes]:
    """Returns hashes of the samples, padding, options and all: what a block gives has a row for every token."""
    options = repr(sorted(batch.options.items())).encode()
    digests = [hashlib.sha256(options) for _ in range(len(batch))]
    for name, tensor in sorted(batch.tensors.items()):
        for digest, row in zip(digests, tensor.cpu().contiguous()):
            digest.update(f"{name} {tuple(row.shape)} {row.dtype}\n".encode())
            digest.update(row.reshape(-1).view(torch.uint8).numpy().data if row.numel() else b"")
    return [digest.digest() for digest in digests]
