"""The model around an adapter: names of its tensors, what is saved beside them, and the base weights."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..checkpoint.identity import digest

PREFIX = "base_model.model."
"""What PEFT puts before the names of the base model's tensors."""

_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
_SAMPLED = 64  # numbers of every base weight that its fingerprint is made of


def clean(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def bare(key: str, adapter_name: str) -> str:
    """A name as it is in a file, without PEFT's prefix."""
    return key.removeprefix(PREFIX).removesuffix(f".{adapter_name}")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that is not a shard of itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def renamed_alike(saved: Sequence[str], found: Sequence[str]) -> bool:
    """Whether the change of the first name, of some of its parts to others, gives all the new names."""
    old, new = saved[0].split("."), found[0].split(".")
    start = len(os.path.commonprefix([old, new]))
    end = len(os.path.commonprefix([old[start:][::-1], new[start:][::-1]]))
    before, after = old[start : len(old) - end], new[start : len(new) - end]
    if before == after:
        return False

    def changed(name: str) -> str:
        parts = name.split(".")
        if not before:
            return ".".join([*parts[:start], *after, *parts[start:]])
        width = len(before)
        places = [i for i in range(len(parts) - width + 1) if parts[i : i + width] == before]
        for place in places[:1]:
            parts[place : place + width] = after
        return ".".join(parts)

    return [changed(name) for name in saved] == list(found)


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


def is_copy(key: str) -> bool:
    """Whether a saved name is that of a copy which PEFT saves of an embedding that is trained whole.

    Once a vocabulary was resized, PEFT saves the embeddings as they are in the model, beside what is saved of trained
    ones anyway.
    """
    return not {"modules_to_save", "original_module"}.isdisjoint(key.split("."))


def embeddings_of(model: nn.Module) -> set[str]:
    """The names of the weights of a model's input and output embeddings, if it is one of transformers."""
    found = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(AttributeError, NotImplementedError):
            found.append(getattr(model, getter)())
    return {f"{name}.weight" for name, module in model.named_modules() if any(module is each for each in found)}


class Base:
    """What a model was before its adapter was filled by transformers, which asks nobody.

    Args:
        model: with the adapter.
        adapter_name: the adapter's.
        with_biases: a file of the adapter holds biases of the model too.
        holders: the modules that hold the adapter's coefficients.
    """

    def __init__(self, model: nn.Module, adapter_name: str, with_biases: bool, holders: Iterable[nn.Module]) -> None:
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
        filled |= {id(holder) for holder in holders}
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


def check_biases(model: nn.Module, config: PeftConfig) -> None:
    """Raises a ValueError if trained biases would be read with updates in them that coefficients make again."""
    if getattr(config, "bias", "none") == "none":
        return
    for name, layer in model.named_modules():
        adapts: Any = getattr(layer, "adapts", None)
        for adapter in getattr(layer, "merged_adapters", ()) if adapts else ():
            if adapts(adapter, "bias"):
                raise ValueError(
                    f"Adapter {adapter!r} is merged in {name!r}, whose bias has its update in it, and biases are saved "
                    "beside coefficients (`bias`): unmerge it first (`unmerge_adapter()`)."
                )


@torch.no_grad()
def base_fingerprint(layers: Iterable[Any]) -> str | None:
    """A hash of a few numbers of every adapted base weight, rounded to bfloat16, or None if it cannot be told.

    So it is the same for a model in float32 and in bfloat16. Quantized, sharded and merged weights have none.
    """
    samples = []
    for module in layers:
        weight = getattr(module.get_base_layer(), module.parameter_name, None)
        if weight is None:
            continue
        plain = type(weight) in (nn.Parameter, torch.Tensor) and not weight.is_meta
        if not plain or weight.dtype not in (torch.float32, torch.float64, torch.bfloat16) or module.merged_adapters:
            return None
        flat = weight.detach().flatten()
        samples.append(flat[:: max(1, len(flat) // _SAMPLED)][:_SAMPLED].float().bfloat16().cpu())
    return digest(torch.cat(samples).view(torch.uint8).numpy().tobytes()) if samples else None


class Keys:
    """Names of the tensors of one adapter in a model's state dict, and what else of the model a checkpoint tells."""

    def __init__(self, model: nn.Module, provenance: Any) -> None:
        names = {id(module): clean(name) for name, module in model.named_modules()}
        adapter, method = provenance.adapter_name, provenance.config.method()
        self._adapter = adapter
        owner = names.get(id(provenance.layers[0]), "")
        self.coefficients = [f"{names.get(id(container), '')}.{adapter}.values" for container in provenance.containers]
        self.record = f"{owner}.{method}_identity.{adapter}"
        self.packed = f"{owner}.{method}_packed.{adapter}"
        self._biases = getattr(provenance.config, "bias", "none") != "none"
        self._beside = {
            f"{clean(name)}.{key}": f"{clean(name)}.{saved}"
            for name, module in model.named_modules()
            if isinstance(module, AuxiliaryTrainingWrapper)
            for saved, key in module.adapter_state_dict_load_map(adapter).items()
        }
        self.adapted = [layer.adapted_name(names[id(layer)].removeprefix(PREFIX)) for layer in provenance.layers]
        self.renamed = self.adapted != [target.name for target in provenance.targets]
        self.base_fingerprint = base_fingerprint(provenance.layers)

    def completed(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A loaded state dict with full names of what has no place in the model: record and packed coefficients."""
        full = {bare(key, self._adapter): key for key in (self.record, self.packed)}
        return {full.get(bare(key, self._adapter), key): tensor for key, tensor in tensors.items()}

    def saved(self, key: str) -> str:
        """The name in the file of what is saved beside the coefficients."""
        return self._beside.get(key, key)

    def belongs(self, key: str) -> bool:
        """Whether a tensor of this name is trained and saved whole beside the coefficients."""
        return key in self._beside or (self._biases and key.rpartition(".")[2] == "bias")
