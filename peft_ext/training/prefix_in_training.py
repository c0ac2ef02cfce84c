"""The part of a network that a training cannot change is computed in the first passes over the data alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .batch import Batch
from .prefix import FrozenPrefix, is_plain, row_keys

_FOR_THE_LOSS = "num_items_in_batch"  # the Trainer's; no block reads it
_FEW = 0.1


class PrefixInTraining(FrozenPrefix):
    """A frozen prefix for the forward passes of a training in evaluation mode, which gives the same to the bit.

    What the blocks give for a sample is that of an earlier forward pass, in a batch of other samples and perhaps of
    another size. Whether such a difference changes a bit is not known beforehand. So the first batch of each size in
    which all samples are known is computed all the same and compared, and where a bit differs what is kept is not used
    for batches of that size. Mixtures of experts, where the samples of a batch decide together how it is
    computed, are computed whole.

    Forward passes are computed whole, too, that have positional arguments, other options than the first one or inputs
    with gradients, while a module is in training mode, with other adapters active than in the first one, with hooks in
    one of the blocks, and within `torch.func`. If what is frozen changes, or thaws, all begins anew.

    Args:
        model: what is trained.
        memory: bytes that may be kept.
        samples: how many there are, 0 if unknown; nothing is kept if they would need more than `memory`.
    """

    def __init__(self, model: nn.Module, memory: float, samples: int) -> None:
        super().__init__(model, self._outputs_of, memory)
        self.samples = samples
        self._made_in: dict[bytes, Any] = {}  # the kind of the batch that what is kept comes from
        self._same: dict[tuple[Any, Any], bool] = {}  # whether batches of two kinds give the same bits
        self._options: dict[str, Any] = {}
        self._adapters: list[Any] = []
        self._frozen: list[torch.Tensor] = []
        self._versions: list[tuple[int, int]] = []
        self._modules: list[nn.Module] = []  # those in the blocks that are passed over
        self._epoch: int | None = None
        self._passes = self._asked = self._known = 0

    def forget(self) -> None:
        super().forget()
        self._made_in.clear()
        self._same.clear()

    @contextmanager
    def step(self, model: nn.Module, epoch: float) -> Iterator[None]:
        """Makes forward passes of the model pass over the blocks, until the end of the context, where that is known.

        Args:
            model: what the Trainer calls, which may be a wrapper; only the model itself is one whose blocks can be
                passed over.
            epoch: how many passes over the data there were. After one, from the second on, in which few batches were
                known (data that change, or are padded to another length in every batch), nothing is kept any more.
        """
        if int(epoch) != self._epoch:
            self._passes += 1
            if self._passes > 2 and self._known < _FEW * self._asked:
                self.forget()
            self._epoch, self._asked, self._known = int(epoch), 0, 0
        if model is not self.model or self.blocks == []:
            yield
            return
        opened: list[ExitStack] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is self.model:  # and not a copy of it
                opened.append(ExitStack())
                opened[-1].enter_context(self._forward(args, kwargs))

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if module is self.model and opened:
                opened.pop().close()

        hooks = [model.register_forward_pre_hook(before, with_kwargs=True)]
        hooks.append(model.register_forward_hook(after, always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            while opened:
                opened.pop().close()

    def _outputs_of(self, batch: Batch) -> list[torch.Tensor]:
        found = self.call(batch, lambda batch: self.model(**batch.tensors, **batch.options))
        return _numbers(found)

    @contextmanager
    def _forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
        batch = None if args or self._inside or self.blocks == [] else self._batch(kwargs)
        if batch is None:
            yield
            return
        self._inside = True
        try:
            with ExitStack() as stack:
                if self._suits(batch):
                    self._enter(stack, batch)
                yield
        finally:
            self._inside = False

    def _batch(self, kwargs: Mapping[str, Any]) -> Batch | None:
        """Returns the arguments of a forward pass as samples; None if it must be computed whole."""
        values = {name: value for name, value in kwargs.items() if name != _FOR_THE_LOSS}
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor) and value.dim()}
        batch = Batch(tensors, {name: value for name, value in values.items() if name not in tensors})
        whole = (
            len({len(tensor) for tensor in tensors.values()}) != 1
            or not len(batch)
            or not is_plain(batch)
            or any(tensor.requires_grad for tensor in tensors.values())
            or torch._C._functorch.peek_interpreter_stack() is not None
            or any(module.training for module in self.model.modules())
        )
        return None if whole else batch

    def _suits(self, batch: Batch) -> bool:
        """Returns whether the blocks can be passed over, for a batch like this; looks for them if need be."""
        if self.blocks is not None:
            versions = _versions(self._frozen)
            if versions != self._versions or any(tensor.requires_grad for tensor in self._frozen):
                self.forget()
                self.blocks = None
        if self.blocks is None:
            self._look(batch)
        return bool(
            self.blocks
            and batch.options == self._options
            and _adapters(self.model) == self._adapters
            and not any(module._forward_hooks or module._forward_pre_hooks for module in self._modules)
        )

    def _look(self, batch: Batch) -> None:
        device = next(iter(batch.tensors.values())).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # a forward pass more changes no number
            try:
                self.blocks = self._find(batch.select(slice(0, 1)))
            except Exception:  # a model may well refuse a batch of one, which the training never gives it
                self.blocks = []
        self._modules = [module for block in self.blocks[:-1] for module in block.modules()]
        if any("moe" in name or "expert" in name for name in (type(m).__name__.lower() for m in self._modules)):
            self.blocks = []
        tensors = [*self.model.parameters(), *self.model.buffers()]
        self._frozen = [tensor for tensor in tensors if not tensor.requires_grad]
        self._versions = _versions(self._frozen)
        self._options, self._adapters = batch.options, _adapters(self.model)

    def _enter(self, stack: ExitStack, batch: Batch) -> None:
        """Makes one forward pass take what is kept for its samples, or keep it."""
        assert self.blocks
        kind, keys = _kind(batch), row_keys(batch)
        pairs = [(self._made_in.get(key), kind) for key in keys]
        known = [key in self._kept and self._same.get(pair, True) for key, pair in zip(keys, pairs)]
        self._asked += 1
        self._known += all(known)
        if all(known) and all(pair in self._same for pair in pairs):
            stack.enter_context(self._passed_over(torch.stack([self._kept[key] for key in keys])))
            return

        def look(block: nn.Module, args: tuple[Any, ...]) -> None:
            features = args[0].detach()
            if not all(known):
                self._keep_all(keys, features, kind, known)
                return
            kept = torch.stack([self._kept[key] for key in keys])
            same_order = kept.stride() == features.stride()  # else the next block may add up in another order
            for pair, row, other in zip(pairs, features, kept):
                self._same[pair] = self._same.get(pair, True) and same_order and torch.equal(row, other)

        stack.callback(self.blocks[-1].register_forward_pre_hook(look).remove)

    def _keep_all(self, keys: list[bytes], features: torch.Tensor, kind: Any, known: list[bool]) -> None:
        if len(features) != len(keys) or self.samples * features[0].nbytes > self.memory:
            self.forget()
            return
        for key, row, is_known in zip(keys, features, known):
            if not is_known and key in self._kept:  # from a kind of batch that gives other bits
                self._bytes -= self._kept.pop(key).nbytes
            if self._keep(key, row) and not is_known:
                self._made_in[key] = kind


def _kind(batch: Batch) -> tuple[Any, ...]:
    """Returns what decides with which kernels a batch is computed; a mask that hides nothing is left out by many."""
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in sorted(batch.tensors.items()))
    return shapes, tuple(bool(tensor.all()) for name, tensor in sorted(batch.tensors.items()) if "mask" in name)


def _versions(tensors: list[torch.Tensor]) -> list[tuple[int, int]]:
    return [(tensor._version, tensor.data_ptr()) for tensor in tensors]


def _adapters(model: nn.Module) -> list[Any]:
    """Returns which adapters are in force."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return [
        (list(layer.active_adapters), list(layer.merged_adapters), layer.disable_adapters, repr(layer.scaling))
        if hasattr(layer, "scaling")
        else (list(layer.active_adapters), list(layer.merged_adapters), layer.disable_adapters)
        for layer in layers
    ]


def _numbers(value: Any) -> list[torch.Tensor]:
    """Returns all tensors of numbers that a model gave."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _numbers(part)]
