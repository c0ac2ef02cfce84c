"""What agents that train one adapter, each on data of its own, send each other, and who may average with whom."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..checkpoint.identity import canonical
from ..seeded_network import SeededNetwork
from ..training.callbacks import trainable_parameters
from ..training.modes import check_adapters
from ..tuners.checkpointed import provenance_of
from ..tuners.surroundings import base_fingerprint
from .soup import check_method, defining_fields


class Exchange:
    """The trained numbers of a model as what an agent sends: one vector, and a description of what it means.

    Agents average their vectors (FedAvg, McMahan et al. 2017, https://arxiv.org/abs/1602.05629, algorithm 1). The
    weights of PRANC (arXiv 2206.08464), adapter or whole network, are linear in the vector: the average of vectors is
    exactly that of weights, and no longer than the vector of one agent. NOLA, LoRA and PRANC on factors multiply two
    factors, and their average is that of the factors, which is not that of the products. Modules that are trained
    whole, such as heads, and networks that are trained whole are averaged weight by weight.

    Args:
        model: a `PeftModel` with an active adapter, a `SeededNetwork`, or any module that is trained as it is.

    Attributes:
        size: how many numbers are trained, P.
        description: what the numbers mean, as values of JSON: the seed and all else that turns them into weights, a
            fingerprint of the base weights that a seeded adapter adapts (null for float16 and quantized ones, which are
            not compared), and the shapes of what is trained. Vectors with equal descriptions can be averaged, see
            [`check_agents`].

    Raises:
        ValueError: nothing is trained, several adapters are active, the method has numbers that cannot be averaged,
            such as MCNC, or trained modules keep running statistics, which are no part of the vector.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._trained = model, trainable_parameters(model)
        if not self._trained:
            raise ValueError("`model` must have parameters that require gradients, got none.")
        self.size = sum(parameter.numel() for parameter in self._trained.values())
        for name, module in model.named_modules():
            own = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
            if getattr(module, "running_mean", None) is not None and (own or isinstance(model, SeededNetwork)):
                raise ValueError(
                    f"`model` must train no modules with running statistics, which are not exchanged, got {name!r}."
                )
        # By way of JSON, as what another agent has sent: tuples are lists there.
        self.description: dict[str, Any] = json.loads(canonical(_describe(model, self._trained)))

    @property
    def vector(self) -> torch.Tensor:
        """The numbers, `(P,)` in float32 on the CPU, in the order of the model."""
        return torch.cat([each.detach().float().flatten().cpu() for each in self._trained.values()])

    @vector.setter
    @torch.no_grad()
    def vector(self, value: torch.Tensor) -> None:
        check_adapters(self._model)  # a merged one would not become the other, and unmerging would take off too much
        value = torch.as_tensor(value)
        if value.shape != (self.size,):
            raise ValueError(f"`vector` must have the shape {(self.size,)}, got {tuple(value.shape)}.")
        if not value.isfinite().all():
            raise ValueError(f"`vector` must have finite numbers, got {int((~value.isfinite()).sum())} that are not.")
        parts = value.split([parameter.numel() for parameter in self._trained.values()])
        for parameter, part in zip(self._trained.values(), parts):
            parameter.copy_(part.view(parameter.shape))


def check_agents(descriptions: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Raises a ValueError unless the vectors of all agents mean the same.

    Args:
        descriptions: those of their `Exchange`s.
        names: what the message calls the agents.
    """
    if not descriptions or len(descriptions) != len(names):
        raise ValueError(f"Every agent must have a description and a name, got {len(descriptions)} and {len(names)}.")
    first = descriptions[0]
    for other, name in zip(descriptions[1:], names[1:]):
        keys = sorted(
            (key for key in first.keys() | other.keys() if first.get(key) != other.get(key)),
            key=lambda key: (key in ("sha256", "modules", "tensors"), key),  # a hash tells less than a field
        )
        if keys:
            mine, theirs = first.get(keys[0], "not there"), other.get(keys[0], "not there")
            raise ValueError(
                f"Agents that average must train numbers that mean the same: `{keys[0]}` is {mine!r} for {names[0]} "
                f"and {theirs!r} for {name}. Give all the same; agents of different seeds can agree on outputs instead."
            )


def _describe(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    if isinstance(model, SeededNetwork):
        check_method(model.config, "the network")
        found = dict(model.identity.to_dict())
    elif isinstance(model, PeftModel):
        adapter = _active(model)
        config = model.peft_config[adapter]
        check_method(config, adapter)
        provenance = provenance_of(model, adapter)
        if provenance is None:
            found = defining_fields(config)
        else:
            found = {**provenance.identity.to_dict(), "base weights": base_fingerprint(provenance.layers)}
    else:
        found = {}
    return found | {"tensors": {name: list(parameter.shape) for name, parameter in trained.items()}}


def _active(model: PeftModel) -> str:
    active = model.active_adapters
    if len(active) != 1:
        raise ValueError(f"`model` must have one active adapter, got {active!r}.")
    return active[0]
