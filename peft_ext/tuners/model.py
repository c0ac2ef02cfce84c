"""What the tuners of all methods share: placement in the model, checks before it is changed, loading."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, get_quantization_kwargs
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from ..checkpoint.identity import check_coefficients, check_target_shapes, shape_name
from ..generators import Generator
from .expansion import SharedExpansion
from .layers import SeededLayer, fans, layer_kind

_KINDS = {
    "linear": "nn.Linear, transformers' Conv1D, quantized linear layers",
    "conv2d": "nn.Conv2d",
    "embedding": "nn.Embedding",
    "vector": "modules that hold vectors only (norms)",
}
_VISION_TARGETS = ["query", "value", "q_proj", "v_proj"]  # names in transformers 4 and 5


class SeededModel(BaseTuner):
    """Base of the tuners whose layers expand coefficients with a frozen generator.

    A method sets `tuner_layer_cls` and `layer_classes`, the layer class for every kind of layer that it can adapt.
    """

    tuner_layer_cls: type[SeededLayer]
    layer_classes: ClassVar[dict[str, type[SeededLayer]]]
    target_module_mapping: dict[str, Any] = {  # lists of names, or a regular expression
        **TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
        **dict.fromkeys(("vit", "deit", "dinov2", "dinov2_with_registers", "beit"), _VISION_TARGETS),
        **dict.fromkeys(("smollm3", "phi3", "qwen2_moe", "qwen3_moe", "olmo", "olmo2", "cohere"), ["q_proj", "v_proj"]),
        "distilbert": ["q_lin", "v_lin"],
    }

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.prefix = f"{cls.tuner_layer_cls.config_class.method()}_"

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        self._expansions: dict[Generator, SharedExpansion] = {}
        self._targets_from_state_dict = state_dict is not None
        super().inject_adapter(
            model,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            state_dict=state_dict,
        )

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Looks at every target before PEFT replaces the first.

        Raises:
            ValueError: a target cannot be adapted, or the shapes of the targets are not those that a loaded
                configuration was saved with.
            NoMatchingPeftModuleError: there is no target.
        """
        if self._targets_from_state_dict or peft_config.target_modules == DUMMY_TARGET_MODULES:
            return
        peft_config = _maybe_include_all_linear_layers(peft_config, model)
        targets: dict[str, nn.Module] = {}
        adaptable: set[str] = set()
        inside_adapted: tuple[str, ...] = ()
        for name, module in model.named_modules():
            if not name or name.startswith(inside_adapted):
                continue
            if isinstance(module, BaseTunerLayer):
                inside_adapted += (f"{name}.",)
            base_layer = base_layer_of(module)
            kind = layer_kind(base_layer)
            if kind in self.layer_classes:
                adaptable.add(name.rpartition(".")[-1])
            if self._check_target_module_exists(peft_config, name):
                if kind not in self.layer_classes:
                    kinds = ", ".join(_KINDS[kind] for kind in self.layer_classes)
                    raise ValueError(
                        f"`target_modules` matches {name!r}, a {type(base_layer).__name__}, which "
                        f"{peft_config.method_name} cannot adapt. It adapts {kinds} (but not the output projection "
                        "inside nn.MultiheadAttention, which is never called)."
                    )
                targets[name] = base_layer
        if not targets and not peft_config.exclude_modules and not peft_config.modules_to_save:
            raise NoMatchingPeftModuleError(
                f"`target_modules` matches no module of {type(model).__name__}: got {peft_config.target_modules!r}"
                + (
                    f" with `layers_to_transform` {peft_config.layers_to_transform!r}"
                    if peft_config.layers_to_transform is not None
                    else ""
                )
                + f". Names that can be adapted here: {', '.join(sorted(adaptable)) or 'none'}."
            )
        shapes = Counter(shape_name(*fans(base_layer)) for base_layer in targets.values())
        check_target_shapes(peft_config.target_shapes, shapes)
        if targets:
            self._check_sizes(peft_config, list(targets.values()))

    def _check_sizes(self, peft_config: Any, targets: list[nn.Module]) -> None:
        """Raises a ValueError if the configuration does not fit the sizes of the base layers that it targets."""

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        module_name = current_key.removeprefix("_orig_mod.")
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config, module_name, self._expansions)
            return
        kind = layer_kind(base_layer_of(target))
        if kind not in self.layer_classes:
            raise ValueError(
                f"{module_name!r}, a {type(target).__name__}, cannot be adapted with {peft_config.method_name}."
            )
        layer = self.layer_classes[kind](
            target, fan_in_fan_out=peft_config.fan_in_fan_out, **get_quantization_kwargs(self)
        )
        layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, peft_config, module_name, self._expansions)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is not trainable before it is activated
        self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        # The configuration is saved after the state. It is also the user's object, perhaps used for another model
        # next: what belongs to this model's checkpoint stays out of its fields.
        config._saved_shapes = dict(  # type: ignore[attr-defined]
            Counter(shape_name(layer.fan_out, layer.fan_in) for layer in _layers(model, adapter_name))
        )
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        names = {id(module): name for name, module in model.named_modules()}
        containers = [layer.container(adapter_name) for layer in _layers(model, adapter_name)]
        expected = {
            f"{names[id(container)]}.{adapter_name}": container[adapter_name].shape
            for container in containers
            if container is not None
        }
        try:
            check_coefficients(state_dict, expected, f".{cls.prefix}", config.size_fields)
        except ValueError:
            withdraw(model, adapter_name)
            raise
        return state_dict


def withdraw(model: nn.Module, adapter_name: str) -> None:
    """Takes off the adapter that PEFT has put into a model before its coefficients were looked at."""
    if not isinstance(model, PeftModel):
        return
    if len(model.peft_config) > 1:
        model.delete_adapter(adapter_name)
    elif isinstance(model.base_model, BaseTuner):
        model.base_model.unload()


def _layers(model: nn.Module, adapter_name: str) -> list[SeededLayer]:
    return [
        module
        for module in model.modules()
        if isinstance(module, SeededLayer) and module.container(adapter_name) is not None
    ]


def base_layer_of(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
