"""Expanding the coefficients of many layers in one product, and not more often than needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..checkpoint.identity import check_finite
from ..generators import Generator, SparseBasis
from . import idle
from .coefficients import Container

_CHEAP = "cpu"  # where comparing coefficients at every read takes no time


class SharedExpansion:
    """The weights that one generator makes for one adapter in all the layers that read it.

    A call with a layer's container returns the generated weights of that layer. The first layer of a forward pass pays
    for a single product over all of them; the others find theirs ready:

    - with gradients, the product serves one forward pass: a layer that asks a second time starts a new one, so every
      pass has a graph of its own. That of a single layer is not kept: the pass holds what it needs;
    - without gradients, it is kept until a coefficient changes. Version counters show most changes; writes through
      `.data` leave no trace there, so the coefficients are compared with those that were expanded: a layer's own at
      every read on a CPU, all of them once a pass on other devices, where a comparison waits for the device.

    A layer is expanded alone, which is always right and slower, where the coefficients of other layers cannot be
    read or a cached tensor would be wrong: sharded parameters (FSDP), parameters on other devices, replicas, under
    `torch.func` transforms and inside `torch.compile`. When activation checkpointing runs a layer again inside a
    backward pass, the layer gets the same bits as before with a graph of its own: gradients accumulate per layer
    and, under re-entrant checkpointing, in the block that is being recomputed.

    A layer is known by the container of its coefficients, the `Coefficients` (adapter name -> parameter) that it
    owns: the object stays the same when parameters are cast, moved or loaded, and holding it does not keep the layer's
    base weights alive.

    Args:
        generator: coefficients of shape `(..., k)` -> weights of shape `(..., size)`.
        shape: of one layer's weights, of `size` entries.
        adapter_name: the adapter whose coefficients are read.
        span: the part of each layer's coefficients that this generator reads.
        one_vector: other layers of the model read the same coefficients, each with an expansion of its own.
    """

    def __init__(
        self,
        generator: Generator,
        shape: tuple[int, ...],
        adapter_name: str,
        span: slice,
        one_vector: bool = False,
    ) -> None:
        self.generator = generator
        self.shape = shape
        self.adapter_name = adapter_name
        self.span = span
        self.one_vector = one_vector
        self.containers: list[Container] = []
        self.settle: Callable[[], None] | None = None  # verifies loaded coefficients before their first use
        self.kept = Kept()
        self._verified = False
        self._sharded = False

    def add(self, container: Container) -> None:
        self.containers.append(container)

    def __call__(self, container: Container) -> torch.Tensor:
        """The generated weights of the layer that owns `container`, in float32 (float64 for float64 coefficients).

        Raises:
            ValueError: the coefficients hold NaN or infinity when they are expanded for the first time.
            RuntimeError: one vector for many layers, where its gradient would be wrong or it cannot be read.
        """
        self.verify()
        parameter = container[self.adapter_name]
        if self.one_vector:
            self._check_whole(parameter)
        if torch.compiler.is_compiling() or self._sharded or not is_plain(parameter):
            return self._expand_alone(parameter)

        idle.use(self.kept)
        key = self._key(container)
        needs_graph = parameter.requires_grad and torch.is_grad_enabled()
        ready = self.kept.ready.get(parameter.device)
        if ready is not None and not self._fits(ready, container, parameter):
            ready = None
        if torch._C._current_graph_task_id() != -1:  # inside a backward pass: a recomputation
            if self.one_vector and ready is not None and key not in ready.joined and _is_distributed():
                raise RuntimeError(
                    "Re-entrant gradient checkpointing in several processes gives wrong gradients for coefficients "
                    "that many layers share (PRANC): they would be reduced before all layers have added theirs. Use "
                    "non-reentrant checkpointing: gradient_checkpointing_kwargs={'use_reentrant': False}."
                )
            value = ready.values[key].flatten() if ready else None
            return _Recomputed.apply(parameter[self.span], self.generator, value).view(self.shape)
        if ready is not None and not self._serves(ready, key, needs_graph):
            ready = None
        if ready is None:
            ready = self._expand_all(parameter.device)
            if key not in ready.values:
                return self._expand_alone(parameter)
        ready.served.add(key)
        if not needs_graph:
            return ready.values[key]
        if key not in ready.graph:  # coefficients without numbers yet, or made in inference mode
            return self._expand_alone(parameter)
        if len(ready.graph) == 1:
            # A whole update that was added to the weight is not needed again: kept, it would be one more copy.
            self.kept.ready.pop(parameter.device, None)
        ready.joined.add(key)
        return ready.graph[key]

    def verify(self) -> None:
        """Verifies coefficients that were loaded, before their first use."""
        if self.settle is not None:
            self.settle()
            self.settle = None

    def _check_whole(self, parameter: torch.Tensor) -> None:
        if _is_shard(parameter) or parameter.numel() != self.generator.num_coefficients:
            raise RuntimeError(
                "The coefficients that many layers share (PRANC) cannot be read: FSDP has put them into a unit other "
                "than this layer's. Wrap the whole model as one unit: `fully_shard(model)` alone, or no "
                "auto_wrap_policy (fsdp_auto_wrap_policy: NO_WRAP)."
            )

    def _fits(self, ready: _Expanded, container: Container, parameter: torch.Tensor) -> bool:
        if ready.parameters.get(container) is not parameter or ready.versions[container] != _version(parameter):
            return False
        return parameter.device.type != _CHEAP or torch.equal(parameter[self.span], ready.coefficients[container])

    def _serves(self, ready: _Expanded, key: object, needs_graph: bool) -> bool:
        if needs_graph:
            return bool(ready.graph) and key not in ready.served
        if ready.stacked.device.type != _CHEAP:
            # Another forward pass begins; one of a part of the model alone may have been between.
            place = ready.places.get(key, 0)
            if key in ready.served or place <= ready.last:
                if not torch.equal(self._stack(ready.parameters), ready.stacked):
                    return False
                if key in ready.served:  # otherwise a model that runs its layers in another order is in mid-pass
                    ready.served.clear()
            ready.last = place
        return True

    def _expand_alone(self, parameter: torch.Tensor) -> torch.Tensor:
        return self.generator.expand(parameter[self.span]).view(self.shape)

    def _expand_all(self, device: torch.device) -> _Expanded:
        parameters: dict[Container, torch.Tensor] = {
            container: parameter
            for container in self.containers
            if self.adapter_name in container
            and is_plain(parameter := container[self.adapter_name])
            and parameter.device == device
            and parameter.numel() >= self.span.stop
        }
        # FSDP2 reduces the gradients of a unit when its backward pass ends. A graph over layers of several units would
        # deliver some later, and units can be whole at the same time: one shard seen means that none may be joined.
        self._sharded = any(
            _is_shard(container[self.adapter_name]) for container in self.containers if self.adapter_name in container
        )
        if self._sharded or len({parameter.dtype for parameter in parameters.values()}) > 1:
            parameters = {}
        gradients = torch.is_grad_enabled()
        # The tensors must outlive an inference mode that they are made under; leaving it turns gradients on.
        with torch.inference_mode(False), torch.set_grad_enabled(gradients):
            expanded = _Expanded(parameters)
            if parameters:
                coefficients = self._stack(parameters)
                if not self._verified:
                    check_finite(coefficients.detach())
                    self._verified = True
                weights = self._joint.expand(coefficients)
                expanded.stacked = coefficients.detach()
                expanded.coefficients = dict(zip(parameters, expanded.stacked.unbind()))
                parts = dict(zip(self._keys(parameters), self._split(weights)))
                expanded.values = {key: part.detach() for key, part in parts.items()}
                expanded.places = {key: place for place, key in enumerate(parts)}
                if weights.requires_grad:
                    expanded.graph = parts
        self.kept.ready[device] = expanded
        return expanded

    @property
    def _joint(self) -> Generator:
        """What makes the weights of all layers in one product."""
        return self.generator

    def _key(self, container: Container) -> object:
        """What the weights that a layer gets are kept by."""
        return container

    def _keys(self, parameters: dict[Container, torch.Tensor]) -> Iterable[object]:
        """Those of all layers."""
        return parameters

    def _stack(self, parameters: dict[Container, torch.Tensor]) -> torch.Tensor:
        return torch.stack([parameter[self.span] for parameter in parameters.values()])

    def _split(self, weights: torch.Tensor) -> Iterable[torch.Tensor]:
        """The weights of each layer. The gradients of several are stacked again; of one there is nothing to copy."""
        return [weights.view(self.shape)] if len(weights) == 1 else weights.view(-1, *self.shape).unbind()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.generator!r}, {len(self.containers)} layers)"


class PartialExpansion(SharedExpansion):
    """A layer's part of a sequence of numbers that one vector makes, of all layers in one product.

    Args:
        generator: of the part.
        adapter_name: the adapter whose coefficients are read.
        first: another part of the sequence, if there is one.
    """

    generator: SparseBasis

    def __init__(self, generator: SparseBasis, adapter_name: str, first: PartialExpansion | None) -> None:
        span = slice(0, generator.num_coefficients)
        super().__init__(generator, (generator.size,), adapter_name, span, one_vector=True)
        self.kept = first.kept if first else self.kept
        self.parts: list[PartialExpansion] = first.parts if first else []
        self.parts.append(self)
        self.parts.sort(key=lambda part: part.generator.start)

    @property
    def _joint(self) -> Generator:
        return self.generator.whole

    def _key(self, container: Container) -> object:
        return self

    def _keys(self, parameters: dict[Container, torch.Tensor]) -> Iterable[object]:
        return self.parts

    def _split(self, weights: torch.Tensor) -> Iterable[torch.Tensor]:
        generators = [part.generator for part in self.parts]
        pieces = weights.flatten().split([generator.size for generator in generators])
        return [generator.with_offset(piece) for generator, piece in zip(generators, pieces)]


class Kept:
    """What an expansion keeps for the next pass, by device."""

    def __init__(self) -> None:
        self.ready: dict[torch.device, _Expanded] = {}

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        held = [each for ready in self.ready.values() for each in ready.values.values()]
        return sum(each.numel() * each.element_size() for each in held)

    def release(self) -> None:
        """Lets go of it."""
        self.ready.clear()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()  # copies and pickles of a model expand for themselves


class _Expanded:
    """One product: what it was made from, what it gave, and which layers have taken theirs in this pass."""

    def __init__(self, parameters: dict[Container, torch.Tensor]) -> None:
        self.parameters = parameters
        self.versions = {container: _version(parameter) for container, parameter in parameters.items()}
        self.stacked = torch.empty(0)
        self.coefficients: dict[Container, torch.Tensor] = {}
        self.values: dict[object, torch.Tensor] = {}
        self.graph: dict[object, torch.Tensor] = {}
        self.served: set[object] = set()
        self.joined: set[object] = set()  # those that got theirs with a graph
        self.places: dict[object, int] = {}  # of the layers in the model
        self.last = -1  # that of the layer that was served last


class _Recomputed(torch.autograd.Function):
    """Expands one layer's coefficients, with the value taken from an earlier expansion if there is one."""

    @staticmethod
    def forward(ctx: Any, coefficients: torch.Tensor, generator: Generator, value: torch.Tensor | None) -> torch.Tensor:
        # No tensor is saved for backward: non-reentrant checkpointing compares the numbers of saved tensors.
        ctx.generator, ctx.coefficients = generator, coefficients
        return generator.expand(coefficients) if value is None else value.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return ctx.generator.vjp(ctx.coefficients, grad), None, None


def is_plain(parameter: torch.Tensor) -> bool:
    """Whether a parameter is what it looks like: a whole tensor of its layer, not a shard, view or wrapper."""
    return (
        type(parameter) is nn.Parameter
        and parameter.numel() > 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _is_shard(parameter: torch.Tensor) -> bool:
    if type(parameter) is nn.Parameter or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # expensive to import, and imported already if there is a shard

    return isinstance(parameter, DTensor)


def _is_distributed() -> bool:
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def _version(parameter: torch.Tensor) -> tuple[bool, int, int]:
    # An inference tensor counts no versions; the comparison of values still sees changes.
    count = 0 if parameter.is_inference() else parameter._version
    return parameter.requires_grad, count, parameter.data_ptr()
