"""The model around an adapter: names of its tensors, what is saved beside them, and the base weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..checkpoint.identity import digest

_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
_SAMPLED = 64  # numbers of every base weight that its fingerprint is made of


def clean(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def bare(key: str, adapter_name: str) -> str:
    """A name as it is in a file, without PEFT's prefix."""
    return key.removeprefix("base_model.model.").removesuffix(f".{adapter_name}")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that is not a shard of itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def saved_modules(model: nn.Module, adapter_name: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a state dict, what PEFT saves with an adapter from modules that are trained whole, by their saved names."""
    found: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            start = f"{clean(name)}."
            own = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
            own = module.adapter_state_dict(adapter_name, own)  # type: ignore[call-arg]
            found |= {f"{start}{key}": value for key, value in own.items()}
    return found


class Base:
    """What a model was before its adapter was filled by transformers, which asks nobody.

    Args:
        model: with the adapter.
        adapter_name: the adapter's.
        with_biases: a file of the adapter holds biases of the model too.
    """

    def __init__(self, model: nn.Module, adapter_name: str, with_biases: bool) -> None:
        self.model = model
        self.adapter_name = adapter_name
        filled = {
            id(module)
            for wrapper in model.modules()
            if isinstance(wrapper, AuxiliaryTrainingWrapper)
            for name, child in wrapper.named_children()
            if name != "original_module"
            for module in child.modules()
        }
        self._tensors = [
            (module, name, tensor)
            for module in model.modules()
            if id(module) not in filled
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None and name != adapter_name and not (with_biases and name == "bias")
        ]

    def check_untouched(self) -> None:
        """Raises a ValueError if a tensor of the model is another object of other numbers, but of the same shape."""
        for module, name, before in self._tensors:
            now = getattr(module, name, None)
            if now is before or not isinstance(now, torch.Tensor) or now.shape != before.shape or now.is_meta:
                continue
            if before.is_meta or not torch.equal(now.to(before), before):
                path = next((path for path, each in self.model.named_modules() if each is module), "")
                raise ValueError(
                    f"The saved adapter holds a tensor {f'{path}.{name}'!r}, which is no part of it and has "
                    "overwritten that of the base model: load the base model again. (If you replaced the tensor "
                    "yourself, do so before the adapter is loaded.)"
                )

    def beside(self, config: PeftConfig) -> dict[str, torch.Tensor]:
        """The biases and modules that the adapter was saved with, by saved name, as they are now."""
        state = self.model.state_dict()
        biases = BaseTuner._get_learnable_bias_state_dict(self.model, state, config)
        return biases | saved_modules(self.model, self.adapter_name, state)


@torch.no_grad()
def base_fingerprint(layers: Iterable[BaseTunerLayer]) -> str | None:
    """A hash of a few numbers of every adapted base weight, rounded to bfloat16, or None if it cannot be told.

    So it is the same for a model in float32 and in bfloat16. Quantized, sharded and merged weights have none.
    """
    samples = []
    for module in layers:
        weight = getattr(module.get_base_layer(), "weight", None)
        if weight is None:
            continue
        plain = type(weight) in (nn.Parameter, torch.Tensor) and not weight.is_meta
        if not plain or weight.dtype not in (torch.float32, torch.float64, torch.bfloat16) or module.merged_adapters:
            return None
        flat = weight.detach().flatten()
        samples.append(flat[:: max(1, len(flat) // _SAMPLED)][:_SAMPLED].float().bfloat16().cpu())
    return digest(torch.cat(samples).view(torch.uint8).numpy().tobytes()) if samples else None
