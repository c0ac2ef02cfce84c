"""What makes an adapted model the one that a ledger belongs to, beside the parameters that can change."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..checkpoint.identity import canonical
from ..checks import default_of
from .derivatives.function import AdapterFunction

_MARK = "configured-"
"""How fingerprints begin that cover the configurations of adapters; older ledgers have others, without them."""

_FREE = re.compile(
    r"path|revision|version|task_type|inference_mode|auto_mapping|tokenizer|dropout|init|runtime_config|"
    r"(loftq|eva|corda|lora_ga)_config|(target|exclude)_modules|modules_to_save|target_parameters|layers_"
)
"""Fields of PEFT's configurations on which a finished model in evaluation mode does not depend, or which show in the
names of its parameters."""


def fingerprint(function: AdapterFunction, like: str = _MARK) -> str:
    """Returns a SHA-256 of the frozen weights, of names and shapes of the others, and of the active configurations.

    Args:
        function: the model as a function of the parameters that can change.
        like: a fingerprint to compare with: one from before configurations were covered does not have them.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(function.model.state_dict(keep_vars=True).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if name not in function.parameters:
            data = tensor.detach().cpu().contiguous().view(-1)
            digest.update(data.view(torch.uint8).numpy().data if data.numel() else b"")
    if not like.startswith(_MARK):
        return digest.hexdigest()
    for text in _configurations(function.model):
        digest.update(f"{text}\n".encode())
    return _MARK + digest.hexdigest()


def _configurations(model: nn.Module) -> list[str]:
    """Returns what the configurations of a model's active adapters say of the function that it is."""
    active: set[str] = set()
    found: dict[str, Any] = {}
    for module in model.modules():
        if isinstance(module, (PeftModel, BaseTunerLayer)):
            active.update(module.active_adapters)
        configurations = getattr(module, "peft_config", None)
        if isinstance(configurations, dict):
            found.update(configurations)
    return [f"{name} {_described(found[name])}" for name in sorted(active & found.keys())]


def _described(config: Any) -> str:
    """Returns the fields of a configuration that change the function, unless they have their defaults.

    With the defaults, a new field of a later release would make another model of every adapter.
    """
    defaults = {each.name: default_of(config, each.name) for each in dataclasses.fields(config)}
    if hasattr(config, "generating"):  # our own configurations say what they generate weights from
        values = config.generating()
    else:
        values = {name: value for name, value in config.to_dict().items() if not _FREE.search(name)}
    kept = {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}
    return canonical(json.loads(json.dumps(kept, default=_plain)))


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)
