"""Where the coefficients of an adapter come from: what they mean, and how they are saved and verified.

PEFT asks a tuner for an adapter's tensors when it saves, and shows it the tensors when it loads; both go through
`CheckpointedModel`. transformers' `load_adapter` fills parameters without asking anybody. For its sake a layer that was
made from a checkpoint's configuration also has buffers for what else the weights file holds, and its coefficients are
verified before they are used.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from peft import PeftModel
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ..checkpoint import quantization
from ..checkpoint.identity import (
    Identity,
    check_checksum,
    check_finite,
    check_identity,
    checksum,
    fold_names,
    numbered,
    read_record,
    record_content,
    unnamed,
    write_record,
)
from .coefficients import Coefficients
from .config import CheckpointedConfig
from .scaling import warn_of_scales
from .surroundings import PREFIX, Base, Keys, clean, embeddings_of, is_copy, renamed_alike, whole
from .target import Target


class Provenance:
    """What the coefficients of one adapter mean, shared by all its layers.

    Attributes:
        fields: the generating fields of the configuration that the adapter was made with.
        targets: the adapted modules, in the order of the model.
        containers: what holds the coefficients, in that order; one for all modules if they share one vector.
        layers: the adapted layers.
        made_with: the configuration, which is the adapter's in the model.
        pending: the adapter was made from a checkpoint's configuration, and its coefficients are not verified yet.
    """

    def __init__(self, adapter_name: str, config: CheckpointedConfig) -> None:
        self.adapter_name = adapter_name
        self.made_with = config
        self.config = copy.copy(config)
        self.fields = copy.deepcopy(config.generating())
        self.targets: list[Target] = []
        self.containers: list[Coefficients] = []
        self.layers: list[CheckpointedLayer] = []
        self.pending = config.identity is not None
        self._base: Base | None = None

    def add(self, layer: CheckpointedLayer, target: Target) -> None:
        """Adds an adapted layer whose coefficients are in place."""
        self.targets.append(target)
        container = layer.container(self.adapter_name)
        if container is not None and not any(container is known for known in self.containers):
            self.containers.append(container)
        self.layers.append(layer)

    @property
    def identity(self) -> Identity:
        return Identity(self.fields, [self.config.described(target) for target in self.targets])

    def parameters(self) -> list[nn.Parameter]:
        """The coefficients of every container."""
        return [container[self.adapter_name] for container in self.containers]

    def await_tensors(self, model: nn.Module) -> None:
        """Makes room for the record and for packed coefficients, which transformers' `load_adapter` fills.

        It fills whatever else of the model a file has tensors for as well: what it must not touch is remembered.
        """
        biases, modules = getattr(self.config, "bias", "none") != "none", getattr(self.config, "modules_to_save", None)
        holders = [container.get_submodule(self.adapter_name) for container in self.containers]
        self._base = Base(model, self.adapter_name, biases, holders)
        others = {"any": torch.empty(0)} if biases or modules else {}
        size = self._record({}, others).numel()
        self.layers[0].buffers_of("identity")[self.adapter_name] = torch.zeros(size, dtype=torch.uint8)
        if quantization.is_integer(self.config.coefficient_dtype):
            packed = quantization.size_of(self._layout().sizes, self.config.coefficient_dtype)
            self.layers[0].buffers_of("packed")[self.adapter_name] = torch.zeros(packed, dtype=torch.uint8)

    def verified(self) -> None:
        """Notes that the coefficients are those of the adapter: nothing is awaited any more."""
        self.pending, self._base = False, None
        for name in ("identity", "packed"):
            buffers = self.layers[0].buffers_of(name)
            if self.adapter_name in buffers:
                del buffers[self.adapter_name]

    def _layout(self) -> quantization.Layout:
        return self.config.layout([parameter.numel() for parameter in self.parameters()])

    def _unpack(self, packed: torch.Tensor, dtype: str) -> list[torch.Tensor]:
        parts = self._layout().unpack(packed, dtype)
        return [part.view(parameter.shape) for part, parameter in zip(parts, self.parameters())]

    def _record(self, coefficients: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The record of tensors by label."""
        count = sum(parameter.numel() for parameter in self.parameters())
        dtype = self.config.coefficient_dtype
        content = record_content(self.identity, dtype, count, coefficients.items(), unnamed(others))
        if others:
            content["named"] = checksum(self._named(others))
        return write_record(content)

    def _check_others(self, content: Mapping[str, Any], others: Mapping[str, torch.Tensor], renamed: bool) -> None:
        """Raises a ValueError if what is saved beside the coefficients was changed; renamed modules are allowed to."""
        check_checksum(content.get("others"), checksum(unnamed(others)), "what is saved beside the coefficients")
        if others and not renamed:
            what = "what is saved beside the coefficients and its names"
            check_checksum(content.get("named"), checksum(self._named(others)), what)

    def _named(self, tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
        """Tensors with their names in the base model."""
        names = {BaseTuner._remove_adapter_name_from_key(clean(name), self.adapter_name): name for name in tensors}
        return [(name.removeprefix(PREFIX), tensors[full]) for name, full in names.items()]

    def changed_field(self, config: CheckpointedConfig) -> str | None:
        """The name of a generating field that has changed in the configuration since the adapter was made, if any."""
        now = config.generating()
        return next((name for name in (*now, *self.fields) if self.fields.get(name) != now.get(name)), None)

    # Saving

    def seal(
        self, config: CheckpointedConfig, keys: Keys, tensors: dict[str, torch.Tensor], others: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The tensors of the adapter as they are saved, with the record.

        Args:
            config: the adapter's; what its file shall say beside its fields is put into it.
            keys: names of the adapter's tensors.
            tensors: coefficients, biases.
            others: modules that are saved whole beside them.

        Raises:
            ValueError: the configuration has changed since the adapter was made, or has become none that can be read.
        """
        self.settle()
        name = self.changed_field(config)
        if name is not None:
            raise ValueError(
                f"`{name}` of the configuration was changed after the adapter was made: the adapter has "
                f"{self.fields.get(name)!r}, the configuration says {config.generating().get(name)!r}. Change it back, "
                "or make a new adapter."
            )
        config.check()
        warn_of_scales(self.adapter_name, [layer.scale_of(self.adapter_name) for layer in self.layers])
        self.config.coefficient_dtype = config.coefficient_dtype
        tensors = {key: tensor for key, tensor in tensors.items() if key not in (keys.record, keys.packed)}
        if any(key not in tensors or tensors[key].is_meta for key in keys.coefficients):
            return tensors  # another process has them
        coefficients = [whole(tensors.pop(key)).detach() for key in keys.coefficients]
        if not all(torch.isfinite(each).all() for each in coefficients):
            warnings.warn("The coefficients are not finite: what is saved cannot be loaded again.", stacklevel=2)
        dtype = config.coefficient_dtype
        if quantization.is_integer(dtype):
            packed = self._layout().pack(coefficients, dtype)
            stored = self._unpack(packed, dtype)
            tensors[keys.packed] = packed
            labelled = {"packed": packed}
        else:
            stored = [quantization.cast(each, dtype) for each in coefficients]
            tensors |= dict(zip(keys.coefficients, stored))
            labelled = numbered(stored)
        kept = {key: tensor for key, tensor in tensors.items() if key not in (*keys.coefficients, keys.packed)}
        tensors[keys.record] = self._record(labelled, {**kept, **others})
        config._saved = {  # type: ignore[attr-defined]
            "identity": self.identity.to_dict(),
            "target_names": fold_names([target.name for target in self.targets]),
            "base_fingerprint": keys.base_fingerprint,
            "coefficient_error": quantization.change(coefficients, stored),
            **config.saved_facts(self.targets),
        }
        return tensors

    # Loading

    def open(
        self, keys: Keys, tensors: dict[str, torch.Tensor], model: nn.Module, prefix: str
    ) -> dict[str, torch.Tensor]:
        """The tensors of a loaded file as the model takes them, all verified.

        Args:
            keys: names of the adapter's tensors in the model.
            tensors: by name in the model.
            model: where they go, not changed yet.
            prefix: of the names of this method's parameters.

        Raises:
            ValueError: the record or the tensors are missing, damaged, or those of another adapter.
        """
        tensors = keys.completed(tensors)
        record = tensors.pop(keys.record, None)
        if record is None:
            elsewhere = [key for key in tensors if f".{prefix}identity" in key]
            if elsewhere:
                raise ValueError(
                    f"The saved adapter does not fit the model: it begins at {elsewhere[0]!r}, which is no adapted "
                    f"module here; the first one is at {keys.record!r}. If modules were renamed, give the "
                    "`key_mapping` from the saved to the new names; layer names can also differ between releases of "
                    "transformers."
                )
        content = read_record(record, keys.record)
        check_identity(content.get("identity"), self.identity, "in the weights file")
        dtype = self._check_dtype(content)
        self._check_renamed(keys, dtype)
        adapted = {key for key in tensors if f".{prefix}" in key and not keys.belongs(key)}
        if quantization.is_integer(dtype):
            self._check_keys(adapted, {keys.packed})
            packed = tensors.pop(keys.packed)
            check_checksum(content.get("coefficients"), checksum([("packed", packed)]), f"{keys.packed!r}")
            tensors |= dict(zip(keys.coefficients, self._unpack(packed, dtype)))
        else:
            self._check_keys(adapted, set(keys.coefficients))
            for key, parameter in zip(keys.coefficients, self.parameters()):
                self._check_coefficients(key, tensors[key], parameter)
                check_finite(tensors[key], f" in {key!r}")
            found = [tensors[key] for key in keys.coefficients]
            if not any(tensor.is_meta for tensor in found):
                check_checksum(content.get("coefficients"), checksum(numbered(found).items()), "the coefficients")
        own = {key: tensors[key] for key in keys.coefficients}
        others = {key: tensor for key, tensor in tensors.items() if key not in own}
        beside = {key: others.pop(key) for key in list(others) if keys.belongs(key)}
        others = {key: tensor for key, tensor in others.items() if not is_copy(key)}
        self._check_strangers(others, model)
        if not any(tensor.is_meta for tensor in beside.values()):
            self._check_others(content, {keys.saved(key): tensor for key, tensor in beside.items()}, keys.renamed)
            # Names are those that were saved, but for PEFT's prefix, or those of renamed modules.
            start = PREFIX if isinstance(model, PeftModel) else ""
            known = beside.keys() & model.state_dict().keys() if keys.renamed else beside.keys()
            unknown = [key for key in sorted(beside) if key not in known or not key.startswith(start)]
            if unknown:
                raise ValueError(f"The saved adapter does not fit the model, which has no {unknown[0]!r}.")
        self.config.coefficient_dtype = dtype
        self._warn_of_base(keys)
        self.verified()
        return {**own, **beside, **others}

    def _check_dtype(self, content: Mapping[str, Any]) -> str:
        """What a record says that the coefficients were saved in."""
        dtype = content.get("dtype")
        if dtype not in quantization.DTYPES:
            raise ValueError(
                f"`dtype` in the record of the saved adapter must be one of {quantization.DTYPES}, got "
                f"{str(dtype)[:50]!r}."
            )
        return str(dtype)

    def _check_renamed(self, keys: Keys, dtype: str) -> None:
        """Raises a ValueError if adapted modules have other names than those saved, and nobody has mapped them.

        A tensor that is found under a new name has been mapped. Where one tensor serves all modules, theirs must follow
        from that of the first.
        """
        alone = quantization.is_integer(dtype) or len(self.containers) < len(self.targets)
        saved = [target.name for target in self.targets]
        if keys.renamed and alone and not renamed_alike(saved, keys.adapted):
            old, new = next((old, new) for old, new in zip(saved, keys.adapted) if old != new)
            raise ValueError(
                f"The saved adapter belongs to other modules: {old!r} was adapted, and {new!r} is here. If modules "
                "were renamed, the names in the weights file must be mapped (`key_mapping`), and one and the same "
                "change must give the new names of all modules, that of the first among them."
            )

    def _warn_of_base(self, keys: Keys) -> None:
        if self.config.base_fingerprint and keys.base_fingerprint not in (None, self.config.base_fingerprint):
            warnings.warn(
                "The base model has other weights than the adapter was trained on: samples of the adapted modules "
                f"differ ({keys.base_fingerprint}, saved was {self.config.base_fingerprint}).",
                stacklevel=2,
            )

    def _check_keys(self, found: set[str], expected: set[str]) -> None:
        missing, unknown = sorted(expected - found), sorted(found - expected)
        if missing or unknown:
            raise ValueError(
                f"The saved adapter does not fit the model: {len(missing)} adapted layers find no coefficients"
                + (f" (first: {missing[0]!r})" if missing else "")
                + f" and {len(unknown)} saved coefficients find no layer"
                + (f" (first: {unknown[0]!r})" if unknown else "")
                + ". Check the base model and `target_modules`; layer names can differ between releases of "
                "transformers."
            )

    def _check_coefficients(self, key: str, tensor: torch.Tensor, parameter: torch.Tensor) -> None:
        if tensor.shape != parameter.shape:
            raise ValueError(
                f"The saved adapter does not fit its configuration: {key!r} must have shape {tuple(parameter.shape)}, "
                f"got {tuple(tensor.shape)}. {' and '.join(f'`{field}`' for field in self.config.size_fields)} in "
                "adapter_config.json must be what it was trained with."
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{key!r} must hold floating-point numbers, got {tensor.dtype}.")

    def _check_strangers(self, strangers: dict[str, torch.Tensor], model: nn.Module) -> None:
        """Weights of the base model, which PEFT saves with some adapters, must be those that the model has."""
        if not strangers:
            return
        state = model.state_dict()
        for key in list(strangers):
            if key in state and state[key].is_meta:
                warnings.warn(f"{key!r} is offloaded, and was not compared with the saved one.", stacklevel=2)
                del strangers[key]
            elif key in state and state[key].shape == strangers[key].shape:
                if torch.equal(state[key].cpu(), strangers[key].to(state[key].dtype).cpu()):
                    del strangers[key]
        embeddings = sorted(strangers.keys() & embeddings_of(model))
        if embeddings:
            raise ValueError(
                f"The saved adapter holds embeddings that are no part of it (first: {embeddings[0]!r}) and would "
                "overwrite the base model, which has others. PEFT saves them with an adapter of embeddings, and once "
                "the vocabulary was resized: rows that were added then are random, others in every process. Train them "
                "(`modules_to_save` with the names of the embeddings), or save the base model after the resizing, load "
                "that, and save the adapter with `save_embedding_layers=False`."
            )
        if strangers:
            raise ValueError(
                f"The saved adapter holds {len(strangers)} tensors that are no part of it (first: "
                f"{min(strangers)!r}) and would overwrite the base model. Take them out of the file. Modules that are "
                "trained beside an adapter are named in `modules_to_save`; trained biases need the `bias` of the "
                "configuration that they were trained with."
            )

    def settle(self) -> None:
        """Verifies coefficients that came in without the tuner's hooks, before their first use.

        Raises:
            ValueError: there are none, or they are damaged, or those of another adapter.
        """
        if not self.pending:
            return
        record = self.layers[0].buffers_of("identity")[self.adapter_name]
        name = f"{self.config.method()}_identity"
        if record.is_meta:
            return
        if not record.any():
            raise ValueError(
                f"No coefficients were loaded for adapter {self.adapter_name!r}, whose configuration comes from a "
                f"checkpoint: the file holds no {name!r}, or its layers have other names. To start a new adapter from "
                "a saved configuration, set its `identity` to None."
            )
        content = read_record(record, name)
        check_identity(content.get("identity"), self.identity, "in the weights file")
        dtype, parameters = self._check_dtype(content), self.parameters()
        assert self._base is not None
        keys = Keys(self._base.model, self)
        self._check_renamed(keys, dtype)
        self._base.check_untouched()
        cast = self._is_cast_down(dtype)  # then nothing can be verified to the bit any more
        if not cast:
            self._check_others(content, self._base.beside(self.config), keys.renamed)
        with torch.no_grad():
            if quantization.is_integer(dtype):
                packed = self.layers[0].buffers_of("packed")[self.adapter_name]
                check_checksum(content.get("coefficients"), checksum([("packed", packed)]), "the coefficients")
                for parameter, part in zip(parameters, self._unpack(packed, dtype)):
                    parameter.copy_(part)
            elif not cast:
                saved = getattr(torch, dtype)
                if checksum(numbered(parameters).items()) != content.get("coefficients"):  # perhaps they were cast up
                    found = checksum(numbered([parameter.to(saved) for parameter in parameters]).items())
                    check_checksum(content.get("coefficients"), found, "the coefficients")
                    self._make_float32()
            if not quantization.is_integer(dtype) and {p.dtype for p in parameters} <= {torch.float16, torch.bfloat16}:
                self._make_float32()
        for parameter in self.parameters():
            check_finite(parameter)
        self._warn_of_base(keys)
        self.verified()

    def _is_cast_down(self, dtype: str) -> bool:
        """Whether the model was cast to half precision, all of it, after coefficients in float32 were loaded."""
        found = {parameter.dtype for parameter in self.parameters()}
        wide = quantization.is_integer(dtype) or dtype == "float32"
        return wide and len(found) == 1 and found <= {torch.float16, torch.bfloat16}

    def _make_float32(self) -> None:
        for container in self.containers:
            parameter = container[self.adapter_name]
            container[self.adapter_name] = nn.Parameter(parameter.float(), parameter.requires_grad)


class CheckpointedLayer(BaseTunerLayer):
    """A layer that knows the provenance of its adapters.

    A method's layer has the attributes `<method>_provenances`, `<method>_identity` and `<method>_packed`, which
    `make_records` makes.
    """

    config_class: ClassVar[type[CheckpointedConfig]]
    record_names: ClassVar[tuple[str, ...]] = ("provenances", "identity", "packed")
    parameter_name = "weight"  # what the base weights' fingerprint is taken of

    @property
    def method(self) -> str:
        """The method's name in lower case."""
        return self.config_class.method()

    def make_records(self) -> None:
        """Makes the attributes."""
        setattr(self, f"{self.method}_provenances", {})
        for name in self.record_names[1:]:
            setattr(self, f"{self.method}_{name}", BufferDict(persistent=True))

    @property
    def provenances(self) -> dict[str, Provenance]:
        """Where adapters come from, by name."""
        return getattr(self, f"{self.method}_provenances")

    def buffers_of(self, name: str) -> BufferDict:
        """What a loaded file holds beside coefficients, by adapter: `"identity"` or `"packed"`."""
        return getattr(self, f"{self.method}_{name}")

    def adapted_name(self, module_name: str) -> str:
        """What this layer adapts, as identities name it.

        Args:
            module_name: where the layer is in the model.
        """
        return module_name

    def container(self, adapter: str) -> Coefficients | None:
        """What holds the coefficients of an adapter, by its name; `None` if this layer reads none of it."""
        raise NotImplementedError

    def scale_of(self, adapter: str) -> float:
        """What the update of an adapter is multiplied by, relative to what its configuration says."""
        return 1.0

    def settle(self) -> None:
        """Verifies the coefficients of all adapters that came in without the tuner's hooks."""
        for provenance in self.provenances.values():
            provenance.settle()

    def train(self, mode: bool = True) -> Any:
        if not mode:  # the last that transformers' `load_adapter` does to layers
            self.settle()
        return super().train(mode)  # type: ignore[misc]
