"""What code sees that reads the weight or bias of an adapted layer instead of calling the layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map, tree_map_only


def read(layer: Any, name: str, base: torch.Tensor) -> torch.Tensor:
    """A parameter of an adapted layer with the updates of its active adapters.

    They are computed when the numbers are needed: models ask a weight for its dtype or device in every forward pass,
    and that shall cost nothing. Under `torch.compile`, `torch.export`, `torch.func` and forward-mode differentiation
    they are computed at once. Packed numbers of a quantized weight are returned as they are.

    Args:
        layer: the adapted layer.
        name: of the parameter.
        base: the parameter of the base layer.
    """
    if layer.disable_adapters or layer.merged or base is None:
        return base
    packed = layer.quantization_backend is not None and not base.is_floating_point()
    known = [adapter for adapter in layer.active_adapters if layer.container(adapter) is not None]
    adapters = [adapter for adapter in known if layer.adapts(adapter, name)]
    if isinstance(layer.base_layer, BaseTunerLayer):
        base = getattr(layer.base_layer, name)
    if packed or not (adapters or layer.mixed):
        return base

    mixed = layer.mixed is not None

    def compute(again: bool = False) -> torch.Tensor:
        if again:  # in a backward pass, in which a vector that many layers share takes kept weights for a mistake
            for expansion in (each for adapter in adapters for each in layer.expansions[adapter] if each.one_vector):
                expansion.kept.release()
        if mixed:
            raise ValueError(
                f"The model reads the {name} of an adapted layer, and in a batch with `adapter_names` there is none "
                "that is right for all rows. Leave this layer out of `target_modules`, or use one adapter at a time."
            )
        quantized = name == "weight" and layer.quantization_backend is not None
        value = layer.get_base_weight() if quantized else base
        for adapter in adapters:
            value = value + layer.parameter_updates(adapter)[name].to(value.device)
            if layer.training and isinstance(layer.dropout[adapter], nn.Dropout) and not torch.compiler.is_compiling():
                warnings.warn(
                    f"The model reads the {name} of an adapted layer and does not call it: "
                    f"`{layer.method}_dropout` has no effect there.",
                    stacklevel=2,
                )
        return value.to(base.dtype)

    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    ):
        return compute()
    coefficients = [] if mixed else [layer.container(adapter)[adapter] for adapter in adapters]
    leaves = (base, *coefficients)
    if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves):
        return _Read.apply(compute, *leaves)
    return AdaptedParameter(base, compute)


class AdaptedParameter(torch.Tensor):
    """Looks like the parameter of the base layer and holds the numbers of the adapted one.

    The numbers are computed at their first use, for this tensor once. Writing to them raises a RuntimeError: it would
    be lost.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _compute: Callable[[], torch.Tensor]

    def __new__(cls, like: torch.Tensor, compute: Callable[[], torch.Tensor]) -> AdaptedParameter:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, like.stride(), dtype=like.dtype, device=like.device
        )
        tensor.__dict__["_compute"] = compute
        return tensor

    def _numbers(self) -> torch.Tensor:
        if "_value" not in self.__dict__:
            with torch.no_grad():
                self.__dict__["_value"] = self._compute()
        return self.__dict__["_value"]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = [*zip(func._schema.arguments, args)]
        given += [(each, kwargs[each.name]) for each in func._schema.arguments if kwargs and each.name in kwargs]
        for argument, value in given:
            if isinstance(value, cls) and argument.alias_info is not None and argument.alias_info.is_write:
                _refuse_writing()
        if func is torch.ops.aten.detach.default:
            return cls(args[0], args[0]._numbers)
        args, kwargs = tree_map_only(cls, cls._numbers, (args, kwargs or {}))
        result = func(*args, **kwargs)
        if func.is_view:  # writing to a part of a weight would be lost as well
            return tree_map(lambda part: cls(part, lambda: part), result)
        return result

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        _refuse_writing()

    def data_ptr(self) -> int:
        return self._numbers().data_ptr()

    def numpy(self, *, force: bool = False) -> Any:
        return self._numbers().numpy(force=force)

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self._numbers().detach().__dlpack__(**kwargs)

    def __dlpack_device__(self) -> Any:
        return self._numbers().__dlpack_device__()

    def tolist(self) -> Any:
        return self._numbers().tolist()

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return repr(self._numbers())

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self._numbers().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._numbers().__reduce_ex__(protocol)


def _refuse_writing() -> NoReturn:
    raise RuntimeError(
        "The weight and bias of a layer with active adapters are sums with their updates and cannot be changed: change "
        "those of its `get_base_layer()`."
    )


class _Read(torch.autograd.Function):
    """An `AdaptedParameter` with a gradient: backward computes the sum again, this time with a graph."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, compute: Callable[..., torch.Tensor], *leaves: torch.Tensor
    ) -> torch.Tensor:
        ctx.compute, ctx.leaves = compute, leaves
        ctx.save_for_backward(*leaves)
        return AdaptedParameter(leaves[0], compute)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        _ = ctx.saved_tensors  # raises if they were changed in between
        wanted = [leaf for leaf, needed in zip(ctx.leaves, ctx.needs_input_grad[1:]) if needed]
        twice = torch.is_grad_enabled()
        with torch.enable_grad():
            value = ctx.compute(again=True)
        found = iter(torch.autograd.grad(value, wanted, grad, create_graph=twice, allow_unused=True))
        return (None, *(next(found) if needed else None for needed in ctx.needs_input_grad[1:]))
