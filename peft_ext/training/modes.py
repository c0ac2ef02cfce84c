"""States of a model in which it is computed, and out of which it comes as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.overrides import TorchFunctionMode

_SETTERS = (torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__)  # type: ignore[attr-defined]


class _WithoutRequests(TorchFunctionMode):
    """Lets nothing ask for the gradient of a tensor."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if function in _SETTERS else function(*args, **(kwargs or {}))


class _Quiet:
    """A hook that cannot ask for the gradient of a tensor."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _WithoutRequests():
            return self.hook(*args, **kwargs)


@contextmanager
def no_input_gradients(model: nn.Module) -> Iterator[None]:
    """Keeps hooks of a model from asking for gradients of its inputs.

    `gradient_checkpointing_enable` of an adapted model registers such a hook at the embeddings, which outlives
    `gradient_checkpointing_disable`. What it is for, segments that are computed again on the way back, rests in
    evaluation mode; but it makes all activations depend on something that may change, and `torch.func` refuses it.

    Args:
        model: with all its hooks, of which those that were there when the context began are meant.
    """
    replaced: list[tuple[dict[int, Any], int, _Quiet]] = []
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number, hook in hooks.items():
                if not isinstance(hook, _Quiet):
                    quiet = hooks[number] = _Quiet(hook)
                    replaced.append((hooks, number, quiet))
    try:
        yield
    finally:
        for hooks, number, quiet in replaced:
            if hooks.get(number) is quiet:
                hooks[number] = quiet.hook


def check_adapters(model: nn.Module) -> None:
    """Raises a ValueError if adapters of a model are merged or disabled: their parameters change nothing then."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for state, found, mend in (
        ("merged into the weights", [name for name, layer in layers if layer.merged], "model.unmerge_adapter()"),
        (
            "disabled",
            [name for name, layer in layers if layer.disable_adapters],
            "model.base_model.enable_adapter_layers()",
        ),
    ):
        if found:
            raise ValueError(
                f"The adapter is {state} in {len(found)} layers (first: {found[0]!r}), where its parameters change "
                f"nothing. Call `{mend}` first."
            )


def check_dependence(result: torch.Tensor, parameters: int) -> None:
    """Raises a ValueError if what a model gave does not depend on any of its trainable parameters.

    Args:
        result: outputs or loss, computed with gradients.
        parameters: how many numbers can change, for the message.
    """
    if not result.requires_grad:
        raise ValueError(
            f"None of the {parameters:,} parameters that could change has an effect on the outputs, so there is no "
            "gradient: they may belong to an adapter that is not active (`model.set_adapter(name)` makes one active), "
            "or to a part that the model does not use."
        )
