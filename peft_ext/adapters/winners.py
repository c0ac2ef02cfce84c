"""k-winners: of the units of a layer only those with the largest outputs are on."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..checks import check_positive_integer
from ..tuners.weight_layers import SeededWeightLayer


def k_winners(units: torch.Tensor, k: int) -> torch.Tensor:
    """Returns units of which all but the k largest in size are zero; gradients reach these k alone.

    Args:
        units: `(..., units)`, as is the result. Among equal ones it is not said which stay.
        k: how many stay.

    Raises:
        ValueError: there are fewer units.
    """
    if k > units.shape[-1]:
        raise ValueError(f"`k` must be at most the number of units, {units.shape[-1]}, got {k}.")
    winners = units.abs().topk(k, dim=-1).indices
    return units * torch.zeros_like(units).scatter(-1, winners, 1.0)


class KWinners:
    """Leaves k units of some layers on, for every input those with the largest outputs, until it is removed.

    The outputs for a task then lie in a smaller space, so that projection protects fewer directions for it (Abbasi et
    al., "Sparsity and heterogeneous dropout for continual learning in the null space of neural activations", 2022).

    The layers of an adapter whose base model is frozen cannot be made sparse, but for what the adapter computes: by
    default the units are the r numbers `A x` of every update that is a product B A: of LoRA and NOLA, and of MCNC and
    PRANC with `apply_to="factors"`. In a whole network, such as a `SeededNetwork`, they are the outputs of modules that
    are named.

    It is a part of what the model computes and is not saved with an adapter: whoever loads that, puts it on again. An
    update with it is not linear, so that seeded layers refuse to be merged or exported; LoRA's do not know of it.

    Args:
        model: with the adapter.
        k: how many units of a layer stay on.
        modules: a regular expression that the names of modules contain whose outputs, tensors `(..., units)`, are the
            units.

    Raises:
        ValueError: there is no such layer, or one has fewer units. For named modules the latter shows when the model is
            called.
    """

    def __init__(self, model: nn.Module, k: int, modules: str | None = None) -> None:
        check_positive_integer("k", k)
        self._seeded: list[SeededWeightLayer] = []
        self._hooks: list[RemovableHandle] = []
        keep, found = partial(k_winners, k=k), []
        for name, module in model.named_modules():
            if modules is not None:
                found += [module] if re.search(modules, name) else []
            elif isinstance(module, LoraLayer):
                found += _linear(name, module)
            elif isinstance(module, SeededWeightLayer) and _fewest_units(module):
                _check_layer(name, module)
                self._seeded.append(module)
        if any(isinstance(hook, _Hook) for module in found for hook in module._forward_hooks.values()):
            raise ValueError("The model has k-winners. Call `remove` of that `KWinners` first.")
        fewest = [_fewest_units(layer) for layer in self._seeded]
        fewest += [int(module.out_features) for module in found if modules is None]
        if not found and not self._seeded:
            where = (
                "update that is a product B A, as those of LoRA and NOLA are, and of MCNC and PRANC with "
                "apply_to='factors'"
                if modules is None
                else (f"module whose name contains {modules!r}")
            )
            raise ValueError(f"There are no units to choose from: the model has no {where}.")
        if fewest and min(fewest) < k:
            raise ValueError(f"`k` must be at most the number of units, {min(fewest)}, got {k}.")
        for layer in self._seeded:
            layer.units = keep
        self._hooks = [module.register_forward_hook(_Hook(keep)) for module in found]

    def remove(self) -> None:
        """Turns all units on again."""
        for layer in self._seeded:
            layer.units = None
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> KWinners:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


@dataclass
class _Hook:
    """Keeps winners of a module's output."""

    keep: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, module: nn.Module, args: Any, output: Any) -> torch.Tensor:
        if not isinstance(output, torch.Tensor):
            raise ValueError(
                f"The outputs of `modules` must be tensors `(..., units)`; a {type(module).__name__} gives a "
                f"{type(output).__name__}."
            )
        return self.keep(output)


def _linear(name: str, layer: LoraLayer) -> list[nn.Linear]:
    """Returns the matrices A of LoRA's adapters of a linear layer."""
    found = [A for A in layer.lora_A.values() if isinstance(A, nn.Linear)]
    if not found or len(found) < len(layer.lora_A):
        raise ValueError(f"k-winners on the units of LoRA are for linear layers; {name!r} is none.")
    return found


def _check_layer(name: str, layer: SeededWeightLayer) -> None:
    """Raises a ValueError for a layer that cannot have k-winners, or has some."""
    if layer.units is not None:
        raise ValueError(f"The model has k-winners on {name!r}. Call `remove` of that `KWinners` first.")
    if getattr(layer.get_base_layer(), "groups", 1) > 1:
        raise ValueError(f"k-winners need the outputs of A, which the grouped convolution {name!r} does not compute.")


def _fewest_units(layer: SeededWeightLayer) -> int:
    """Returns the lowest rank of the updates of a layer; 0 if they are no products."""
    with torch.no_grad():
        updates: list[Any] = [
            layer.update(adapter)[0] for adapter in layer.active_adapters if layer.container(adapter) is not None
        ]
    return min((update[0].shape[-2] for update in updates if isinstance(update, tuple)), default=0)
