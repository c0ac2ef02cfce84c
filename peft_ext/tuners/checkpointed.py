"""Tuners whose adapters are sealed when they are saved and verified when they are loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from .config import CheckpointedConfig
from .mixed import MixedBatch, Pool, copies_of, mixed_batch
from .provenance import CheckpointedLayer, Provenance
from .surroundings import Keys, check_biases, saved_modules
from .target import Target


class CheckpointedModel(BaseTuner):
    """A tuner whose adapters are sealed when they are saved and verified when they are loaded."""

    tuner_layer_cls: type[CheckpointedLayer]  # type: ignore[assignment]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self._provenance: Provenance | None = None
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if self._provenance is not None and self._provenance.pending:
            self._provenance.await_tensors(model)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        with nullcontext() if names is None else mixed_batch(self, names, copies_of(**kwargs)):
            yield

    def mixed_batch_of(self, names: Sequence[str]) -> MixedBatch:
        """A batch whose rows have these adapters."""
        return MixedBatch(names)

    def _record(self, config: CheckpointedConfig, adapter_name: str, layer: CheckpointedLayer, target: Target) -> None:
        """Notes that a layer has got an adapter."""
        if self._provenance is None:
            self._provenance = Provenance(adapter_name, config)
            # A loaded adapter's own configuration makes a new one of its kind, which nobody has coefficients for.
            alike = [each for each in layer.provenances.values() if each.made_with is config]
            for each in alike:
                each.settle()
            self._provenance.pending &= not alike
        self._provenance.add(layer, target)
        layer.provenances[adapter_name] = self._provenance

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        provenance = provenance_of(model, adapter_name)
        pool = _pool_with(model, adapter_name)
        if provenance is None and pool is not None:
            with pool.holding(adapter_name):
                own = {key: value for key, value in model.state_dict().items() if f".{adapter_name}." in key}
                sealed = cls._get_adapter_state_dict(model, config, adapter_name, own, unwanted_adapter_names)
                return {key: tensor.clone() for key, tensor in sealed.items()}
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if provenance is None:
            return found
        check_biases(model, config)
        keys = Keys(model, provenance)
        others = saved_modules(model, adapter_name, state_dict)
        lost = [key for key in keys.coefficients if key not in found]
        alike = [name for name in unwanted_adapter_names if any(f".{name}." in key for key in lost)]
        if alike:
            raise ValueError(
                f"Adapter {adapter_name!r} cannot be saved beside {alike[0]!r}: modules of the model have that name "
                f"too ({lost[0]!r}), and PEFT takes what is in them for tensors of {alike[0]!r}. Delete that one, and "
                "load it again under another name."
            )
        return provenance.seal(config, keys, found, others)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        provenance = provenance_of(model, adapter_name)
        if _pool_with(model, adapter_name) is not None:
            raise ValueError(
                f"{adapter_name!r} is in the model's pool: delete it first, or load the file under another name."
            )
        if provenance is None:
            return state_dict
        if any(adapter_name in layer.merged_adapters for layer in provenance.layers):
            raise ValueError(
                f"Adapter {adapter_name!r} is merged: unmerging would take off what is loaded now, and not what was "
                "merged. Call `unmerge_adapter()` first."
            )
        fresh = provenance.pending
        try:
            opened = provenance.open(Keys(model, provenance), state_dict, model, cls.prefix)
        except ValueError:
            if fresh:
                withdraw(model, adapter_name)
            raise
        config.coefficient_dtype = provenance.config.coefficient_dtype
        return opened


def _pool_with(model: nn.Module, adapter_name: str) -> Pool | None:
    """The pool of a model, if the adapter is in it."""
    pool = getattr(getattr(model, "base_model", None), "pool", None)
    return pool if pool is not None and adapter_name in pool else None


def provenance_of(model: nn.Module, adapter_name: str) -> Provenance | None:
    """Where an adapter of a model comes from; `None` if it adapts no layer, or is not of this package."""
    for module in model.modules():
        if isinstance(module, CheckpointedLayer) and adapter_name in module.provenances:
            return module.provenances[adapter_name]
    return None


def withdraw(model: nn.Module, adapter_name: str) -> None:
    """Takes off the adapter that PEFT has put into a model before its coefficients were looked at."""
    if not isinstance(model, PeftModel):
        return
    if len(model.peft_config) > 1:
        model.delete_adapter(adapter_name)
    elif isinstance(model.base_model, BaseTuner):
        model.base_model.unload()
