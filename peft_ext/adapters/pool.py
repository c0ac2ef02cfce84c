"""Thousands of adapters on one model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..checkpoint.identity import check_identity
from ..tuners.coefficients import Container
from ..tuners.expansion import SharedExpansion
from ..tuners.layers import SeededLayer
from ..tuners.mixed import BASE
from ..tuners.model import SeededModel
from ..tuners.provenance import Provenance
from ..tuners.scaling import is_unscaled
from ..tuners.surroundings import Keys
from .saved import read, verify


class AdapterPool:
    """Adapters that are equal to one of a model but for their coefficients.

    PEFT puts every adapter into every layer, which takes time and memory that grow with the number of adapters. Here an
    adapter is its coefficients, one vector, and one adapter at a time is in the layers. All have names of the model's,
    as if each had been loaded by itself: `model.set_adapter(name)`, `adapter_names=[...]` in `forward` and
    `generate`, `model.delete_adapter(name)`, merging, `model.save_pretrained(..., selected_adapters=[name])`.

    An adapter of the pool is frozen. `model.set_requires_grad(name)` makes the active one trainable, until another one
    takes its place in the layers. If its parameters are changed while it is active, it keeps the change.

    Args:
        model: with at least one adapter of NOLA, PRANC or MCNC.
        like: the adapter that all are equal to; the active one by default.

    Raises:
        ValueError: the model has a pool already; or the adapter trains biases or modules beside its coefficients, which
            every adapter of the pool would have to have its own of.
        TypeError: the model has no adapter of these methods.
    """

    def __init__(self, model: PeftModel, like: str | None = None) -> None:
        tuner = getattr(model, "base_model", None)
        if not isinstance(model, PeftModel) or not isinstance(tuner, SeededModel):
            raise TypeError(
                f"`model` must be a PeftModel with an adapter of NOLA, PRANC or MCNC, got {type(model).__name__} "
                f"around {type(tuner).__name__}."
            )
        if tuner.pool is not None:
            raise ValueError("`model` must have no other pool, got one that has one. Load more adapters into that.")
        like = model.active_adapter if like is None else like
        if like not in model.peft_config:
            raise ValueError(f"`like` must be an adapter of the model, got {like!r}.")
        config: Any = model.peft_config[like]
        if config.bias != "none" or config.modules_to_save:
            raise ValueError(
                f"Adapters in a pool must be coefficients alone, got {like!r}, which trains "
                + ("biases" if config.bias != "none" else f"{config.modules_to_save}")
                + " too. Load such adapters one by one with `model.load_adapter`."
            )
        self.model, self._tuner = model, tuner
        found = [layer for layer in tuner.modules() if isinstance(layer, SeededLayer) and like in layer.provenances]
        self._like: Provenance = found[0].provenances[like]
        self._like.settle()
        self._rows: dict[str, torch.Tensor] = {}
        self._held: str | None = None
        self._slots: dict[Container, slice] = {}
        tuner.pool = self

    # What is in it

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    @property
    def nbytes(self) -> int:
        """The bytes of all coefficients."""
        return sum(row.numel() * row.element_size() for row in self._rows.values())

    def load(self, places: Mapping[str, str | os.PathLike[str]]) -> None:
        """Loads saved adapters, from folders or repositories of the hub, by the names that they shall have.

        Every one is verified as `PeftModel.from_pretrained` does it. If one is refused, none is loaded.

        Raises:
            ValueError: a name is taken, or can be none; or an adapter is damaged, of another kind than the pool's, or
                holds more than coefficients. The message begins with its name, or says which it is.
        """
        taken = [name for name in places if name in self.model.peft_config]
        if taken:
            raise ValueError(f"`places` must have names that the model has no adapter of, got {taken[0]!r}.")
        for name in places:
            _check_name(name)
        like = self._like if self._held is None else self._provenance  # the first one may be gone
        if like.adapter_name not in self.model.peft_config:
            raise ValueError(
                f"{like.adapter_name!r}, which the adapters of the pool are equal to, has been deleted, and the pool "
                "is empty: nothing says any more what fits. Make a new pool."
            )
        sizes = [parameter.numel() for parameter in like.parameters()]
        other_base, configs, rows = [], {}, {}
        fingerprint = Keys(self._tuner.model, like).base_fingerprint
        for name, place in places.items():
            # One tensor for each, which goes when the adapter is deleted.
            rows[name] = row = torch.empty(sum(sizes), dtype=torch.float32, device="cpu")
            try:
                config = self._read(place, like, row)
            except (ValueError, FileNotFoundError) as error:
                raise type(error)(f"{name!r}: {error}") from error
            if config.base_fingerprint and fingerprint and config.base_fingerprint != fingerprint:
                other_base.append(name)
            configs[name] = _unsaved(config)
        if other_base:
            warnings.warn(
                "The base model has other weights than those that some adapters were trained on: "
                f"{', '.join(map(repr, other_base[:5]))}{' and others' if len(other_base) > 5 else ''}.",
                stacklevel=2,
            )
        self._rows.update(rows)
        self.model.peft_config.update(configs)
        if self._held is None and places:
            self._put_into_layers(next(iter(places)))

    def _read(self, place: str | os.PathLike[str], like: Provenance, row: torch.Tensor) -> Any:
        """Reads an adapter's coefficients into a row. Returns its configuration."""
        saved = read(place)
        if saved.is_network:
            raise ValueError("an adapter is needed, got a whole network from a seed.")
        check_identity(saved.identity, like.identity, "in adapter_config.json")
        saved.targets, saved.shapes_known = list(like.targets), True
        verify(saved)
        if saved.others:
            raise ValueError(
                f"an adapter in a pool must be coefficients alone, got {min(saved.others)!r} beside them. Load it with "
                "`model.load_adapter`."
            )
        coefficients = saved.coefficients()
        if any(vector.dtype != torch.float32 for vector in coefficients):
            raise ValueError("coefficients in a pool must be in single precision or less, got float64.")
        torch.cat([vector.flatten() for vector in coefficients], out=row)
        return saved.config

    # What tuners ask

    @property
    def held(self) -> str:
        """The adapter of the pool that the layers hold, under its name."""
        assert self._held is not None
        return self._held

    def coefficients(self, name: str, container: Container) -> torch.Tensor:
        """The coefficients that an adapter has in the layer of a container."""
        if name == self._held:
            return container[name].detach()
        return self._rows[name][self._slots[container]]

    def check_unscaled(self) -> None:
        """Raises a ValueError if the adapter in the layers is scaled: the others, in its place, would be so too."""
        if self._held is not None and not is_unscaled(layer.scale_of(self._held) for layer in self._layers):
            raise ValueError(
                f"Adapters in a pool have no scales of their own, and {self._held!r} is scaled: the scale would become "
                "that of every other. Put it back with `unscale_layer()` of the layers, or load the adapter that is to "
                "be scaled with `model.load_adapter`."
            )

    def hold(self, name: str) -> None:
        """Puts an adapter into the layers, in place of the one that they hold."""
        if name == self._held:
            return
        self.check_unscaled()
        if any(self.held in layer.merged_adapters for layer in self._layers):
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=3)
            self._tuner.unmerge_adapter()  # which may put another adapter into the layers
            return self.hold(name)
        before = self.held
        self._write_back()
        for layer, modules, dictionaries in self._places:
            attributes = layer.__dict__  # read anew: a dictionary can have been replaced
            for names in (*modules, *(attributes[each] for each in dictionaries)):
                names[name] = names.pop(before)
            active = layer.active_adapters
            if before in active:  # past nn.Module's `__setattr__`, which takes longer than all else here
                attributes["_active_adapter"] = [name if each == before else each for each in active]
        for expansion in self._expansions:
            expansion.adapter_name = name
        self._provenance.adapter_name = name
        active = self._tuner.active_adapters
        if before in active:
            renamed = [name if each == before else each for each in active]
            self._tuner.active_adapter = renamed if len(renamed) > 1 else name
        self._held, self._tuner._mixed = name, None
        for parameter in self._parameters():  # which were those of another one, that may have been trained
            parameter.requires_grad_(False)
            parameter.grad = None
        self._fill()

    def drop(self, name: str) -> bool:
        """Removes an adapter. Returns whether the layers hold it still, since there is no other to put in its place."""
        others = [each for each in self._rows if each != name]
        active_later = self._tuner._active_before_merge
        if active_later is not None and name in active_later:
            self._tuner._active_before_merge = [each for each in active_later if each != name] or None
        if name == self._held and others:
            active = self._tuner.active_adapters
            if name in active and len(active) > 1:
                self._switch_off(name)
            elif name in active:
                warnings.warn(
                    f"Adapter {name} was active which is now deleted. Setting active adapter to {others[0]}.",
                    stacklevel=3,
                )
            self.hold(others[0])
        del self._rows[name]
        self._tuner._mixed = None
        last = name == self._held
        if last:
            self._held = None
        return last

    @contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """Puts an adapter into the layers for a while."""
        before = self.held
        trained = [(each, each.requires_grad, each.grad) for each in self._parameters()]
        self.hold(name)
        try:
            yield
        finally:
            self.hold(before)
            for parameter, requires_grad, gradient in trained:
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient

    # Its place in the layers

    def _switch_off(self, name: str) -> None:
        """Takes an adapter out of several that are active; the others stay so."""
        rest = [each for each in self._tuner.active_adapters if each != name]
        for layer in self._tuner.modules():
            if isinstance(layer, SeededLayer):
                layer._active_adapter = list(rest)
        self._tuner.active_adapter = rest if len(rest) > 1 else rest[0]

    def _put_into_layers(self, name: str) -> None:
        active = self._tuner.active_adapters
        self._tuner.inject_adapter(self._tuner.model, name)
        self._layers = [
            each for each in self._tuner.modules() if isinstance(each, SeededLayer) and name in each.provenances
        ]
        self._places = [(layer, *_names_in(layer, name)) for layer in self._layers]
        self._provenance: Provenance = self._layers[0].provenances[name]
        expansions = {id(each): each for layer in self._layers for each in layer.expansions[name]}
        self._expansions: list[SharedExpansion] = list(expansions.values())
        self._holders = [container.get_submodule(name)._parameters for container in self._provenance.containers]
        self._sizes = [parameter.numel() for parameter in self._provenance.parameters()]
        ends = torch.tensor(self._sizes).cumsum(0).tolist()
        self._slots = {
            container: slice(start, end) for container, start, end in zip(self._provenance.containers, [0, *ends], ends)
        }
        self._held, self._tuner._mixed = name, None
        self._fill()
        if self._tuner.active_adapters != active:
            self._tuner.set_adapter(active)

    def _parameters(self) -> list[torch.Tensor]:
        return [each["values"] for each in self._holders]  # type: ignore[misc]

    @torch.no_grad()
    def _fill(self) -> None:
        torch._foreach_copy_(self._parameters(), self._rows[self.held].split(self._sizes))

    @torch.no_grad()
    def _write_back(self) -> None:
        """Keeps what has become of the coefficients in the layers; a cast to half precision is no change."""
        row, now = self._rows[self.held], torch.cat(self._parameters())
        if not torch.equal(now, row.to(now)):
            row.copy_(now)


def _check_name(name: str) -> None:
    """Raises a ValueError for what PyTorch does not take as the name of a module, and for the base model's name."""
    try:
        nn.ModuleDict().add_module(name, None)
    except (KeyError, TypeError) as error:
        reason = error.args[0]
    else:
        if name != BASE:
            return
        reason = "it means the base model in `adapter_names`"
    raise ValueError(f"`places` must have names that a module can have, without dots, got {name!r}: {reason}.")


def _unsaved(config: Any) -> Any:
    """The configuration of a saved adapter as that of one in a model, which is known by what it adapts there."""
    config.identity = config.target_names = config.target_shapes = config.base_fingerprint = None
    config.inference_mode = True
    return config


def _names_in(layer: SeededLayer, adapter: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Where a layer keeps an adapter by its name: in dictionaries of submodules, and in attributes of these names."""
    modules, dictionaries = [], []
    for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
        names = getattr(layer, attribute)
        if adapter not in names:
            continue
        if isinstance(names, nn.Module):
            modules.append(names._modules if isinstance(names, nn.ModuleDict) else names._buffers)
        else:
            dictionaries.append(attribute)
    return modules, dictionaries
