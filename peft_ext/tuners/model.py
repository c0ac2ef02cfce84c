"""What the tuners of all methods share: placement in the model, checks before it is changed, loading."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, cast

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, get_quantization_kwargs
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.integrations import init_empty_weights
from peft.utils.other import AuxiliaryTrainingWrapper, _get_submodules, get_pattern_key
from torch import nn

from ..checkpoint.identity import Identity, check_identity, check_target_shapes, unfold_names
from .checkpointed import CheckpointedModel
from .combining import add_weighted_adapter
from .expansion import SharedExpansion
from .expert_layers import SeededExperts, parameter_target
from .layers import SeededLayer, execution_device, layer_kind, target_of
from .mixed import MixedBatch, Pool
from .target import Target, shape_counts, together
from .target_parameters import Place, parameter_hint, resolve

_KINDS = {
    "linear": "nn.Linear, transformers' Conv1D, quantized linear layers",
    "conv2d": "nn.Conv2d",
    "embedding": "nn.Embedding",
    "parameter": "by `target_parameters`, matrices and stacks of experts",
    "vector": "modules that hold vectors only (norms)",
}
_VISION_TARGETS = ["query", "value", "q_proj", "v_proj"]  # names in transformers 4 and 5


class SeededModel(CheckpointedModel):
    """Base of the tuners whose layers expand coefficients with a frozen generator.

    A method sets `tuner_layer_cls` and `layer_classes`, the layer class for every kind of layer that it can adapt.
    """

    tuner_layer_cls: type[SeededLayer]  # type: ignore[assignment]
    layer_classes: ClassVar[dict[str, type[SeededLayer]]]
    pool: Pool | None = None  # of further adapters, which `adapter_names` may name too
    _mixed: MixedBatch | None = None
    _active_before_merge: list[str] | None = None  # if an adapter of the pool was put in their place
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
        self._mixed = None
        self._injected = adapter_name
        self._expansions: dict[Any, SharedExpansion] = {}
        self._found: dict[str, Target] = {}  # the targets by name, with the names that they were saved by
        self._targets_from_state_dict = state_dict is not None
        self._places: list[Place] = []
        with warnings.catch_warnings():
            # PEFT matches patterns with the names of modules alone.
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
            )
        names = [*self.targeted_module_names, *self.targeted_parameter_names]
        self._expansions, self._found, self._provenance = {}, {}, None  # which would outlive the adapter
        for field in ("rank_pattern", "alpha_pattern"):
            keys = getattr(self.peft_config[adapter_name], field, {})
            unmatched = sorted(key for key in keys if not any(get_pattern_key([key], name) == key for name in names))
            if unmatched:
                warnings.warn(
                    f"The following {field} keys did not match any targeted module or parameter and were ignored: "
                    f"{unmatched}.",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """PEFT would look for biases to train at the adapted layers, which show sums with their updates."""
        only = f"{self.prefix}only"
        configs = [cast(Any, self.peft_config[name]) for name in self.active_adapters]
        apart = [config for config in configs if config.bias == only]
        for config in apart:
            config.bias = "none"
        try:
            super()._mark_only_adapters_as_trainable(model)
        finally:
            for config in apart:
                config.bias = only
        if apart:
            for layer in model.modules():
                if isinstance(layer, self.tuner_layer_cls):
                    bias = getattr(layer.get_base_layer(), "bias", None)
                    if bias is not None:
                        bias.requires_grad = True

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        known = model_config.get("model_type") in self.target_module_mapping
        if peft_config.target_modules is None and peft_config.target_parameters and not known:
            peft_config.target_modules = set()
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        peft_config.check_fields()  # with the model's default target_modules, which can be a pattern
        return peft_config

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        self._active_before_merge = None
        names = self._within_reach(adapter_name)
        pooled = self.pool is not None and any(name in self.pool for name in names)
        if not pooled:
            super().set_adapter(adapter_name, inference_mode=inference_mode)
        elif self.active_adapters != names:  # otherwise the layers hold it in the place of the one that was active
            super().set_adapter(adapter_name, inference_mode=True)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        names = self._known(adapter_names)
        idle = [name for name in names if self.pool is not None and name in self.pool and name != self.pool.held]
        if idle and requires_grad:
            raise ValueError(
                f"Adapters of the pool can be trained while they are active, {idle[0]!r} is not: `set_adapter` first."
            )
        super().set_requires_grad([name for name in names if name not in idle], requires_grad)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        active = self.active_adapters
        self._within_reach(adapter_names or [])
        super().merge_adapter(adapter_names, safe_merge)
        if self.active_adapters != active:  # one of the pool had to make room
            self._active_before_merge = active

    def unmerge_adapter(self) -> None:
        super().unmerge_adapter()
        if self._active_before_merge is not None:
            self.set_adapter(self._active_before_merge, inference_mode=True)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> None:
        self._within_reach(adapter_names or [])
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def delete_adapter(self, adapter_name: str) -> None:
        self._mixed = None
        if self.pool is None or adapter_name not in self.pool or self.pool.drop(adapter_name):
            super().delete_adapter(adapter_name)
        else:
            del self.peft_config[adapter_name]

    def _known(self, adapter_names: str | Sequence[str]) -> list[str]:
        """The names in a list; a ValueError if there is no such adapter."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise ValueError(f"Adapter {unknown[0]} not found.")
        return names

    def _within_reach(self, adapter_names: str | Sequence[str]) -> list[str]:
        """The names in a list, once the layers hold the adapters.

        Raises:
            ValueError: there is no such adapter, or several are in the pool.
        """
        names = self._known(adapter_names)
        pooled = [name for name in names if self.pool is not None and name in self.pool]
        if len(pooled) > 1:
            raise ValueError(
                f"One adapter of the pool can be in the layers at a time, got {pooled[0]!r} and {pooled[1]!r}. Give "
                "the rows of a batch adapters of their own with `adapter_names`, or load one with `model.load_adapter`."
            )
        if pooled and self.pool is not None:
            self.pool.hold(pooled[0])
        return names

    def mixed_batch_of(self, names: Sequence[str]) -> MixedBatch:
        """What is known of a batch whose rows have these adapters: all that the last one has expanded, if it fits."""
        if self.pool is not None:
            self.pool.check_unscaled()
        if self._mixed is None or self._mixed.names != list(names) or not self._mixed.still_fits():
            self._mixed = MixedBatch(names, self.pool)
        return self._mixed

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        **options: Any,
    ) -> None:
        """Adds an adapter that is made from others of the same modules, seed and generating fields.

        It is an adapter like any other: of their size, saved and loaded as they are, not active yet. With `"linear"`
        PRANC's update of whole weights is exactly the sum of theirs, each times its weight and its present scale.
        NOLA's is that of LoRA's `linear` on the same factors: A and B are summed with the square roots of weights times
        scales, so that two equal adapters of weight 1/2 give twice their update. The coefficients of MCNC, and of PRANC
        on factors, cannot be combined.

        Args:
            adapters: names of those that are combined.
            weights: a number for each, which may be negative.
            adapter_name: of the new one.
            combination_type: `"linear"`; for a single adapter any that LoRA has, which are the same.
            **options: none; those of LoRA's other combination types are refused.

        Raises:
            ValueError: there is no such adapter, there is one of the new name, the adapters are not alike, have modules
                in `modules_to_save`, or cannot be combined this way.
        """
        add_weighted_adapter(self, adapters, weights, adapter_name, combination_type, options)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Looks at every target before PEFT replaces the first.

        Raises:
            ValueError: a target cannot be adapted, or the shapes of the targets are not those that a loaded
                configuration was saved with.
            NoMatchingPeftModuleError: there is no target.
        """
        if self._targets_from_state_dict or peft_config.target_modules == DUMMY_TARGET_MODULES:
            return
        self._places = resolve(peft_config, model)
        parameters = {place.module_name for place in self._places}
        peft_config = _maybe_include_all_linear_layers(peft_config, model)
        targets: dict[str, nn.Module] = {}
        adaptable: set[str] = set()
        left: list[str] = []  # modules with an adapter of this name, from before, that are no targets now
        inside_adapted: tuple[str, ...] = ()
        kinds = self.adaptable_kinds(peft_config)
        for name, module in model.named_modules():
            if not name or name.startswith(inside_adapted):
                continue
            matches = self._check_target_module_exists(peft_config, name)
            if isinstance(module, BaseTunerLayer):
                inside_adapted += (f"{name}.",)
                if self._injected in getattr(module, "provenances", {}) and not matches and name not in parameters:
                    left.append(name)
            base_layer = base_layer_of(module)
            kind = layer_kind(base_layer)
            if kind in kinds:
                adaptable.add(name.rpartition(".")[-1])
            if matches:
                if self._check_tied_module_exists(peft_config, name):  # it gets what the input embedding gets
                    continue
                if name in parameters:  # a name of the module that holds experts stands for them
                    continue
                if kind not in kinds:
                    known = ", ".join(_KINDS[kind] for kind in kinds)
                    raise ValueError(
                        f"`target_modules` matches {name!r}, a {type(base_layer).__name__}, which "
                        f"{peft_config.method_name} cannot adapt. It adapts {known}." + parameter_hint(name, base_layer)
                    )
                targets[name] = base_layer
        if left:
            raise ValueError(
                f"The model has an adapter {self._injected!r} already, in {left[0]!r}, which is no target of the new "
                "one: it would stay there. Take it off (`unload()` of the model that `get_peft_model` gave), load the "
                "base model again, or give the new adapter another `adapter_name`."
            )
        if not targets and not self._places and not peft_config.exclude_modules and not peft_config.modules_to_save:
            raise NoMatchingPeftModuleError(
                f"`target_modules` matches no module of {type(model).__name__}: got {peft_config.target_modules!r}"
                + (
                    f" with `layers_to_transform` {peft_config.layers_to_transform!r}"
                    if peft_config.layers_to_transform is not None
                    else ""
                )
                + f". Names that can be adapted here: {', '.join(sorted(adaptable)) or 'none'}."
            )
        found = [target_of(name.removeprefix("_orig_mod."), base_layer) for name, base_layer in targets.items()]
        found += [parameter_target(place.name, place.base_layer, peft_config.fan_in_fan_out) for place in self._places]
        check_target_shapes(peft_config.target_shapes, shape_counts(found))
        saved = [target._replace(name=name) for target, name in zip(found, self._saved_order(peft_config, found))]
        if peft_config.identity is not None:
            identity = Identity(peft_config.generating(), [peft_config.described(target) for target in saved])
            check_identity(peft_config.identity, identity, "in adapter_config.json")
        self._found = {target.name: described for target, described in zip(found, together(saved))}
        if found:
            peft_config.check_sizes(found)

    def adaptable_kinds(self, peft_config: Any) -> list[str]:
        """The kinds of layers that an adapter of some configuration can adapt."""
        return list(self.layer_classes)

    def _saved_order(self, peft_config: Any, found: list[Target]) -> list[str]:
        """The names by which the adapted modules were saved, in the order of the model: streams are drawn by them.

        Renamed modules are known by their order and shapes, which the identity then verifies; that somebody meant it
        shows when the weights are loaded, whose names must have been mapped.
        """
        names = [target.name for target in found]
        if peft_config.target_names is None:
            return names
        saved = unfold_names(peft_config.target_names)
        return saved if len(saved) == len(names) and set(saved) != set(names) else names

    def _record(self, config: Any, adapter_name: str, layer: Any, target: Target) -> None:
        super()._record(config, adapter_name, layer, target)
        provenance = layer.provenances[adapter_name]
        if provenance.pending:
            for expansion in layer.expansions[adapter_name]:
                expansion.settle = provenance.settle

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
        if parameter_name is None and any(place.module_name == current_key for place in self._places):
            return  # its parameters follow, one by one
        if parameter_name is None and self._check_tied_module_exists(peft_config, current_key):
            self._tie(peft_config, adapter_name, target, target_name, parent)
            return
        existing = target
        if parameter_name is not None and isinstance(target, SeededExperts):
            existing = target.adapting(parameter_name) or target
        if isinstance(existing, self.tuner_layer_cls) and existing.parameter_name == (parameter_name or "weight"):
            target = existing
            described = self._found.get(module_name) or target.target(module_name)
            target.update_layer(adapter_name, peft_config, described, self._expansions)
            self._record(peft_config, adapter_name, target, described)
            return
        options = get_quantization_kwargs(self)
        kind = layer_kind(base_layer_of(target))
        if parameter_name is not None:
            kind, options["parameter_name"] = "parameter", parameter_name
        if kind not in self.layer_classes:
            raise ValueError(
                f"{module_name!r}, a {type(target).__name__}, cannot be adapted with {peft_config.method_name}."
            )
        layer = self.layer_classes[kind](target, fan_in_fan_out=peft_config.fan_in_fan_out, **options)
        described = self._found.get(module_name) or layer.target(module_name)
        layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, peft_config, described, self._expansions)
        self._record(peft_config, adapter_name, layer, described)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is not trainable before it is activated
        self._replace_module(parent, target_name, layer, target)

    def _tie(self, config: Any, adapter_name: str, target: nn.Module, name: str, parent: nn.Module) -> None:
        """Gives the output embedding the update of the input embedding."""
        source = self.model.get_input_embeddings()  # type: ignore[operator]
        if not isinstance(source, SeededLayer) or source.container(adapter_name) is None:
            raise ValueError(
                f"`ensure_weight_tying` needs the input embedding to be adapted, whose weight {name!r} has: take "
                "it out of `exclude_modules`."
            )
        layer = target if isinstance(target, SeededLayer) else self.layer_classes["linear"](target)
        if layer is not target:
            layer._active_adapter = adapter_name
        layer.tie(adapter_name, source, config.dropout)
        if layer is not target:
            self._replace_module(parent, name, layer, target)

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        for place in self._places:
            parent, target, target_name = _get_submodules(model, place.module_name)
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._create_and_replace(
                    peft_config, adapter_name, target, target_name, parent, place.name, place.parameter_name
                )
        return [place.name for place in self._places]

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        # Of a module that another adapter adapts, PEFT gives the name of what is inside, and would leave it untied.
        return [name.removesuffix(".base_layer") for name in super()._get_module_names_tied_with_embedding()]

    # PEFT calls these for LoRA alone; they change the targets of the configuration.
    _add_modules_to_save_to_tie = LoraModel._add_modules_to_save_to_tie
    _add_targets_to_tie = LoraModel._add_targets_to_tie

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        # A weight that two modules share (tied embeddings) would get the updates of both, or one that it has not got.
        # Where all adapters are tied too, the weight stays one.
        owners = Counter(id(weight) for module in self.modules() for weight in module._parameters.values())
        for layer in self.modules():
            if isinstance(layer, SeededLayer):
                for source in layer.tied_to.values():
                    if layer.expansions.keys() == source.expansions.keys() == layer.tied_to.keys():
                        owners[id(source.get_base_layer().weight)] = 1
        for layer in self.modules():
            if isinstance(layer, SeededLayer):
                base_layer = layer.get_base_layer()
                for name, weight in base_layer._parameters.items():
                    if weight is not None and owners[id(weight)] > 1 and type(weight) is nn.Parameter:
                        owners[id(weight)] -= 1
                        setattr(base_layer, name, nn.Parameter(weight.data, weight.requires_grad))

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        unloaded = not isinstance(new_module, SeededLayer)
        if unloaded and isinstance(child, (SeededExperts, AuxiliaryTrainingWrapper)):
            setattr(parent, child_name, new_module)  # PEFT would look for a weight, which a head of layers has not
        elif isinstance(new_module, SeededLayer) and execution_device(new_module.get_base_layer()) is not None:
            setattr(parent, child_name, new_module)  # PEFT would move the coefficients to the meta device
        else:
            super()._replace_module(parent, child_name, new_module, child)


def base_layer_of(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
