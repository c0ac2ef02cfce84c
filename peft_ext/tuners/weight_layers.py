"""Adapted layers of one weight: linear layers, convolutions and embeddings."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from .layers import SeededLayer, Update
from .mixed import MixedBatch

_FEWEST_ROWS = 16  # inputs from which on one product with a sum of weights is faster than two products


def _has_rows(x: torch.Tensor, width: int) -> bool:
    """Whether an input has so many rows that one product is faster; no, if they can be any number when compiled."""
    if not torch.compiler.is_compiling():
        return x.numel() >= _FEWEST_ROWS * width
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # expensive to import

    return statically_known_true(x.numel() >= _FEWEST_ROWS * width)


def _is_hooked(module: nn.Module) -> bool:
    """Whether a call does more than the `forward` of the module's class (accelerate replaces that of an object)."""
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )


class SeededWeightLayer(SeededLayer):
    """A layer of one weight, in which its output is linear: an update adds to the output, or to the weight before."""

    joined_types: tuple[type[nn.Module], ...] = ()  # base layers of exactly these classes do what `_product` does
    units: Callable[[torch.Tensor], torch.Tensor] | None = None  # what is done to `A x`, see `KWinners`

    def _hidden(self, hidden: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """`A x`, its units in dimension `dim`, after what is done to them."""
        return hidden if self.units is None else self.units(hidden.movedim(dim, -1)).movedim(-1, dim)

    def _check_linear(self) -> None:
        if self.units is not None:
            raise ValueError(
                "With k-winners on its units an update is not linear: it cannot be merged or exported, nor be one of "
                "several in a batch. Call `remove` of the `KWinners` first."
            )

    def linear_update(self, adapter: str) -> tuple[Update, torch.Tensor | None]:
        self._check_linear()
        return super().linear_update(adapter)

    def _delta_weight(self, adapter: str, update: Update) -> torch.Tensor:
        self._check_linear()
        return super()._delta_weight(adapter, update)

    def _adapted(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        updates = {adapter: self._update_at(adapter, x.device) for adapter in adapters}
        joined = self._joined(updates, x) if not args and not kwargs else []
        if joined:
            base_layer = cast(Any, self.base_layer)
            weight, bias = base_layer.weight, base_layer.bias
            for adapter in joined:
                update, bias_update = updates.pop(adapter)
                weight = weight + self._delta_weight(adapter, update)
                bias = bias if bias_update is None else bias + bias_update
            result = self._product(x, weight, bias)
        else:
            result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for adapter, update_and_bias in updates.items():
            result = result + self._output(adapter, x, *update_and_bias)
        return result if result.dtype == dtype else result.to(dtype)

    def _mixed(self, batch: MixedBatch, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._check_linear()
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for part in batch.parts(self):
            update, bias = self._assembled(part.adapters[0], part.weights)
            chosen = x if part.rows is None else x[part.rows]
            output = self._output_by_row(part.adapters[0], chosen, update, bias)
            scaling = self._scaling_of(part)
            if isinstance(scaling, torch.Tensor):
                output = output * scaling.view(-1, *(1 for _ in output.shape[1:])).to(output)
            elif scaling != 1:
                output = output * scaling
            result = result + output if part.rows is None else result.index_add(0, part.rows, output.to(result.dtype))
        return result if result.dtype == dtype else result.to(dtype)

    @abstractmethod
    def _output_by_row(self, adapter: str, x: torch.Tensor, update: Update, bias: torch.Tensor | None) -> torch.Tensor:
        """What updates add to the output of the base layer, unscaled, one for every row of `x`."""

    @abstractmethod
    def _output(self, adapter: str, x: torch.Tensor, update: Update, bias: torch.Tensor | None) -> torch.Tensor:
        """What an update adds to the output of the base layer."""

    def _product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The output of the base layer with another weight and bias."""
        raise NotImplementedError

    def _joined(self, updates: dict[str, tuple[Update, torch.Tensor | None]], x: torch.Tensor) -> list[str]:
        """The adapters whose updates are added to the weight, for one product in place of two or more.

        In training that saves two of the three products of an update of the whole weight. It has to be what the base
        layer does (no hooks, other classes, quantized or sharded weights), and in single precision at least: rounded
        to half precision, the sum of a weight and a small update is often the weight. For a few inputs the addition
        takes longer than the products.
        """
        base_layer = self.base_layer
        if (
            type(base_layer) not in self.joined_types
            or not _has_rows(x, self.in_features)
            or _is_hooked(base_layer)
            or (torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type))
        ):
            return []
        weight = base_layer.weight
        if type(weight) not in (nn.Parameter, torch.Tensor) or weight.dtype not in (torch.float32, torch.float64):
            return []
        return [
            adapter
            for adapter, (update, _) in updates.items()
            if isinstance(update, torch.Tensor)
            and update.dtype == weight.dtype
            and not (self.training and isinstance(self.dropout[adapter], nn.Dropout))
        ]

    def _update_at(self, adapter: str, device: torch.device) -> tuple[Update, torch.Tensor | None]:
        """`update` on the device of the input: coefficients that many layers share can be on another one.

        That of the bias is scaled; that of the weight is, where it is used.
        """
        update, bias = self.update(adapter)
        bias = bias if bias is None else self._scaled(adapter, bias).to(device)
        if isinstance(update, tuple):
            A, B = update
            return (A.to(device), B.to(device)), bias
        return update.to(device), bias

    def _drop_out(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        return self.dropout[adapter](x) if self.training else x


class SeededLinear(SeededWeightLayer):
    """`nn.Linear`, transformers' `Conv1D` and the quantized linears that PEFT knows."""

    joined_types = (nn.Linear, Conv1D)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        # Of weights that are stored as (in, out), the conversion turns back those of Conv1D alone.
        turned = self.fan_in_fan_out and not isinstance(self.get_base_layer(), Conv1D)
        here = self.container(adapter_name) is not None and adapter_name not in self.tied_to
        return here and not turned and self.units is None

    def _to_weight(self, delta: torch.Tensor) -> torch.Tensor:
        return delta.T if self.fan_in_fan_out else delta

    def _output(self, adapter: str, x: torch.Tensor, update: Update, bias: torch.Tensor | None) -> torch.Tensor:
        x = self._drop_out(adapter, self._cast_input_dtype(x, self._dtype(adapter)))
        if isinstance(update, tuple):
            A, B = update
            return self._scaled(adapter, F.linear(self._hidden(F.linear(x, A)), B))
        return F.linear(x, self._scaled(adapter, update), bias)

    def _product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, weight.T if self.fan_in_fan_out else weight, bias)

    def _output_by_row(self, adapter: str, x: torch.Tensor, update: Update, bias: torch.Tensor | None) -> torch.Tensor:
        x = self._cast_input_dtype(x, self._dtype(adapter))
        flat = x[:, None] if x.dim() == 2 else x.flatten(1, -2)  # (rows, positions, fan_in)
        for factor in update if isinstance(update, tuple) else (update,):
            flat = torch.bmm(flat, factor.mT)
        if bias is not None:
            flat = flat + bias[:, None]
        return flat.view(*x.shape[:-1], -1)


class SeededConv2d(SeededWeightLayer):
    """`nn.Conv2d` with any stride, padding, dilation and groups: A is a convolution, B mixes its channels."""

    joined_types = (nn.Conv2d,)

    @property
    def _conv(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self.get_base_layer())

    def _to_weight(self, delta: torch.Tensor) -> torch.Tensor:
        return delta.view(self._conv.weight.shape)

    def _output(self, adapter: str, x: torch.Tensor, update: Update, bias: torch.Tensor | None) -> torch.Tensor:
        conv = self._conv
        x = self._drop_out(adapter, self._cast_input_dtype(x, self._dtype(adapter)))
        if isinstance(update, tuple) and conv.groups == 1:
            A, B = update
            hidden = self._hidden(conv._conv_forward(x, A.view(-1, *conv.weight.shape[1:]), None), -3)
            return self._scaled(adapter, F.conv2d(hidden, B[:, :, None, None]))
        # Every group of output channels reads its own inputs through the same A: no two-step form in one call.
        return conv._conv_forward(x, self._delta_weight(adapter, update), bias)

    def _product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self._conv._conv_forward(x, weight, bias)

    def _output_by_row(self, adapter: str, x: torch.Tensor, update: Update, bias: torch.Tensor | None) -> torch.Tensor:
        conv = self._conv
        x = self._cast_input_dtype(x, self._dtype(adapter))
        if conv.padding_mode != "zeros":
            x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        factors = isinstance(update, tuple) and conv.groups == 1
        first = update[0] if factors else (update[1] @ update[0] if isinstance(update, tuple) else update)
        # A convolution of all rows, side by side in the channels, with a group or more for each.
        hidden = F.conv2d(
            x.flatten(0, 1)[None],
            first.reshape(-1, *conv.weight.shape[1:]),
            None,
            conv.stride,
            conv.padding if conv.padding_mode == "zeros" else 0,
            conv.dilation,
            len(x) * conv.groups,
        ).unflatten(1, (len(x), -1))[0]
        if not factors:
            return hidden if bias is None else hidden + bias[:, :, None, None]
        return torch.bmm(update[1], hidden.flatten(2)).view(len(x), -1, *hidden.shape[2:])


class SeededEmbedding(SeededWeightLayer):
    """`nn.Embedding`: A has a column per token, B maps to the embedding dimension."""

    def _to_weight(self, delta: torch.Tensor) -> torch.Tensor:
        return delta.T

    def _output(self, adapter: str, x: torch.Tensor, update: Update, bias: torch.Tensor | None) -> torch.Tensor:
        table = cast(nn.Embedding, self.get_base_layer())
        rows = (update[0] if isinstance(update, tuple) else update).T
        embedded = F.embedding(x, rows, padding_idx=table.padding_idx, scale_grad_by_freq=table.scale_grad_by_freq)
        result = self._drop_out(adapter, embedded)
        if isinstance(update, tuple):
            result = F.linear(self._hidden(result), update[1])
        result = self._scaled(adapter, result)
        embed_scale = self._get_embed_scale()  # layers that multiply their embeddings (Gemma)
        return result if embed_scale is None else result * embed_scale.to(result.dtype)

    def _output_by_row(self, adapter: str, x: torch.Tensor, update: Update, bias: torch.Tensor | None) -> torch.Tensor:
        A = update[0] if isinstance(update, tuple) else update  # (rows, r or dimension, tokens)
        index = x.flatten(1)[:, None].expand(-1, A.shape[1], -1)
        result = A.gather(2, index).mT  # (rows, positions, r or dimension)
        if isinstance(update, tuple):
            result = torch.bmm(result, update[1].mT)
        result = result.view(*x.shape, -1)
        embed_scale = self._get_embed_scale()
        return result if embed_scale is None else result * embed_scale.to(result.dtype)
