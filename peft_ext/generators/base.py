"""What all generators share."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .. import randomness


def autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    """Keeps weights from being generated in the low precision that autocast chooses for activations."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class Frozen:
    """A frozen tensor, made at first use, once per device, and kept for as long as something holds this object.

    Args:
        make: a function of a module that makes the tensor on the CPU.
        arguments: its arguments; `shared` tells tensors apart by them.
        keep: False to make the tensor again at every use.
    """

    def __init__(self, make: Callable[..., torch.Tensor], *arguments: Any, keep: bool = True) -> None:
        self.make = make
        self.arguments = arguments
        self.keep = keep
        self._stored: dict[torch.device, torch.Tensor] = {}

    _shared: ClassVar[weakref.WeakValueDictionary[tuple[Any, ...], Frozen]] = weakref.WeakValueDictionary()

    @classmethod
    def shared(cls, make: Callable[..., torch.Tensor], *arguments: Any) -> Frozen:
        """The one tensor of these arguments in this process."""
        key = (make, *arguments)
        frozen = cls._shared.get(key)
        if frozen is None:
            frozen = cls._shared[key] = cls(make, *arguments)
        return frozen

    def like(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor on the device of `x`, and in its dtype if it holds floating-point numbers."""
        tensor = self._stored.get(x.device)
        if tensor is None:
            tensor = (self._constant if torch.compiler.is_exporting() else self._materialize)(x.device)
        return tensor.to(x.dtype) if tensor.is_floating_point() and tensor.dtype != x.dtype else tensor

    @property
    def nbytes(self) -> int:
        """Memory that is held now: 0 before the first use."""
        return sum(tensor.nbytes for tensor in self._stored.values())

    @torch.compiler.assume_constant_result  # compiled code must not: it would serve other generators without asking
    def _constant(self, device: torch.device) -> torch.Tensor:
        stored = self._stored.get(device)  # made since the trace began
        with torch._C.DisableTorchFunction():  # the switches of gradients are no part of the program
            return self._materialize(device) if stored is None else stored

    @torch.compiler.disable
    def _materialize(self, device: torch.device) -> torch.Tensor:
        # Outside the modes under which a program is traced, whose tensors have no numbers.
        with _disable_current_modes(), torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            tensor = self.make(*self.arguments).to(device)
        if self.keep:
            if device.type != "cpu":
                self._stored.pop(torch.device("cpu"), None)  # the model has moved: keep no second copy
            self._stored[device] = tensor
        return tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickle regenerates the numbers.
        return Frozen.shared if self.keep else partial(Frozen, keep=False), (self.make, *self.arguments)


def uniform_tensor(
    seed: int, stream: tuple[str | int, ...], shape: tuple[int, ...], factor: float, version: int, start: int = 0
) -> torch.Tensor:
    """The numbers of a random stream from `start` on as a tensor, times a factor."""
    tensor = randomness.uniform(seed, stream, torch.Size(shape).numel(), start, version).view(shape)
    return tensor if factor == 1.0 else tensor.mul_(factor)


class Generator(ABC):
    """A frozen map from coefficients to weights, with an exact backward pass.

    Two generators of the same arguments are equal and hold the same frozen tensors.
    """

    num_coefficients: int
    size: int
    """Numbers that one coefficient vector is expanded to."""

    @property
    @abstractmethod
    def frozen(self) -> tuple[Frozen, ...]:
        """The tensors that are kept in memory."""

    @property
    @abstractmethod
    def frozen_sizes(self) -> tuple[int, ...]:
        """Numbers of entries of the tensors of `frozen`, without making them."""

    @property
    def frozen_nbytes(self) -> tuple[int, ...]:
        """What the tensors of `frozen` take in memory, without making them: four bytes an entry by default."""
        return tuple(4 * size for size in self.frozen_sizes)

    @property
    def nbytes(self) -> int:
        """Memory that the generator holds now: 0 before its first use, and always if nothing is kept."""
        return sum(tensor.nbytes for tensor in self.frozen)

    def expand(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Expands one or many coefficient vectors.

        Computed in at least float32 whatever the autocast state. Differentiable any number of times and usable under
        `torch.func` transforms. No tensor is saved for the backward pass, so that one expansion can serve code that
        counts or offloads saved tensors (activation checkpointing) without being noticed.

        Args:
            coefficients: shape `(..., num_coefficients)`.

        Returns:
            Shape `(..., size)`; float64 for float64 coefficients, otherwise float32.

        Raises:
            ValueError: the last dimension is not `num_coefficients`.
        """
        if coefficients.shape[-1] != self.num_coefficients:
            raise ValueError(
                f"`coefficients` must have {self.num_coefficients} entries in the last dimension, got shape "
                f"{tuple(coefficients.shape)}."
            )
        coefficients = coefficients.to(torch.promote_types(coefficients.dtype, torch.float32))
        if coefficients.is_meta:
            return coefficients.new_empty(*coefficients.shape[:-1], self.size)
        return self._expand(coefficients)

    @abstractmethod
    def _expand(self, coefficients: torch.Tensor) -> torch.Tensor:
        """`expand` of coefficients of the right shape and dtype."""

    @abstractmethod
    def vjp(self, coefficients: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """The derivative of `(expand(coefficients) * grad).sum()`: shape and dtype of `coefficients`."""
