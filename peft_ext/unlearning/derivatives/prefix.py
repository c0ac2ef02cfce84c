"""The part of a network that nothing can change, computed once a sample."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .data import Batch

FEATURES = "features of the frozen prefix"  # among the tensors of a batch; no argument of any model


class FrozenPrefix:
    """Blocks of a network that come before everything that can change: what they give is kept sample by sample.

    The blocks are the first ones of an `nn.ModuleList`, each of which takes a tensor first, which requires no gradient,
    and gives a tensor. What is kept is the input of the last such block, the first one that a change may go through.
    Networks where that does not work, or would change a bit of the outputs, are computed whole, and so are batches with
    arguments that are neither a tensor of samples nor a plain value, such as `interpolate_pos_encoding=True`.

    Args:
        model: in eval mode, with gradients for what can change alone, whenever this is used.
        outputs: of the model, which it computes within `passed_over`.
        memory: bytes that may be kept.
    """

    def __init__(self, model: nn.Module, outputs: Callable[[Batch], torch.Tensor], memory: float) -> None:
        self.model = model
        self.outputs = outputs
        self.memory = memory
        self.blocks: list[nn.Module] | None = []  # None: not looked for yet
        self._kept: dict[bytes, torch.Tensor] = {}

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Within, what the blocks give is kept. What is frozen must not change meanwhile."""
        self.blocks = None
        try:
            yield
        finally:
            self.blocks = []
            self._kept.clear()

    @torch.enable_grad()
    def _find(self, batch: Batch) -> list[nn.Module]:
        lists = [list(module) for module in self.model.modules() if isinstance(module, nn.ModuleList)]
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
            """Those that can be passed over, and the one behind them."""
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
            if len(features) == len(batch) and torch.equal(self.outputs(_with(batch, features)), expected):
                return self.blocks
        return []

    def recall(self, batch: Batch) -> Batch:
        """The batch, with what the blocks give for its samples if that is known."""
        if not _is_plain(batch):
            return batch
        if self.blocks is None:
            self.blocks = self._find(batch.select(slice(0, 1)))
        if not self._kept:
            return batch
        found = [self._kept.get(key) for key in _keys(batch)]
        known = [features for features in found if features is not None]
        return batch if len(known) < len(found) else _with(batch, torch.stack(known))

    @contextmanager
    def passed_over(self, features: torch.Tensor | None) -> Iterator[None]:
        """Forward passes take what the blocks give from `features`, unless `None`."""
        skipped = [] if features is None or not self.blocks else self.blocks[:-1]
        before = [block.__dict__.get("forward") for block in skipped]
        for block in skipped:
            block.forward = lambda *args, **kwargs: features  # type: ignore[method-assign]
        try:
            yield
        finally:
            for block, forward in zip(skipped, before):
                del block.forward
                if forward is not None:
                    block.forward = forward  # type: ignore[method-assign]

    @contextmanager
    def kept(self, batch: Batch) -> Iterator[None]:
        """A forward pass of a batch keeps what the blocks give for its samples."""
        if not self.blocks or not _is_plain(batch) or FEATURES in batch.tensors:
            yield
            return

        def keep(block: nn.Module, args: tuple[Any, ...]) -> None:
            for key, features in zip(_keys(batch), args[0].detach()):
                if key not in self._kept and (len(self._kept) + 1) * features.nbytes <= self.memory:
                    self._kept[key] = features.clone()

        hook = self.blocks[-1].register_forward_pre_hook(keep)
        try:
            yield
        finally:
            hook.remove()


def _with(batch: Batch, features: torch.Tensor) -> Batch:
    return Batch({**batch.tensors, FEATURES: features}, batch.options)


def _is_plain(batch: Batch) -> bool:
    return all(value is None or isinstance(value, (bool, int, float, str)) for value in batch.options.values())


def _keys(batch: Batch) -> list[bytes]:
    """Hashes of the samples, padding, options and all: what a block gives has a row for every token."""
    options = repr(sorted(batch.options.items())).encode()
    digests = [hashlib.sha256(options) for _ in range(len(batch))]
    for name, tensor in sorted(batch.tensors.items()):
        for digest, row in zip(digests, tensor.cpu().contiguous()):
            digest.update(f"{name} {tuple(row.shape)} {row.dtype}\n".encode())
            digest.update(row.reshape(-1).view(torch.uint8).numpy().data if row.numel() else b"")
    return [digest.digest() for digest in digests]
