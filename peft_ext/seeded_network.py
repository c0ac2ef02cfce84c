"""Whole networks from a seed and coefficients, without base weights: what PRANC and MCNC were published for."""

from __future__ import annotations

import copy
import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from huggingface_hub import CommitInfo
from safetensors.torch import save_file
from torch import nn

from .checkpoint import quantization
from .checkpoint.card import About
from .checkpoint.hub import upload
from .checkpoint.identity import (
    Identity,
    canonical,
    check_checksum,
    check_identity,
    checksum,
    digest,
    read_record,
    record_content,
    write_record,
)
from .generators import Generator
from .generators.base import Frozen
from .tuners.config import SCALED, SeededConfig
from .tuners.description import NETWORK_CONFIG_NAME, NETWORK_WEIGHTS_NAME, describe
from .tuners.expansion import SharedExpansion
from .tuners.network import UPDATE, A, B, Weight, matrices_of, product, start_of, weights_of

_ADAPTER = "network"
NETWORK_COEFFICIENTS = f"coefficients.{_ADAPTER}"
_RECORD = "_extra_state"


class SeededNetwork(nn.Module):
    """A network whose parameters are random numbers plus an update: `theta0 + spread * generator(coefficients)`.

    PRANC and MCNC with `apply_to="weight"` flatten the parameters into one sequence, in their order in the network,
    and fill it with one generator (PRANC, arXiv 2206.08464, equation 1; MCNC, arXiv 2406.19301, section 3), so that
    chunks and coefficients do not end at layers. The sparse basis gives every coefficient equally many weights of the
    whole network.

    NOLA and MCNC with `apply_to="factors"` make the update of every matrix, `(fan_out, fan_in)`, a product of B
    `(fan_out, r)` and A `(r, fan_in)`, of rank `r` or, if that is less, of the smaller side of the matrix. A linear or
    convolutional layer has a weight of outputs by all else; an embedding, or another parameter of several dimensions,
    one of all other dimensions by the last one. Vectors (biases, weights of norms, and matrices of one row or column)
    are updated as they are, without factors. MCNC cuts all A, all B and all vectors of the network into chunks as one
    sequence each. NOLA has `num_basis` coefficients for A and for B of every matrix, and as many as for B for all
    vectors together. A starts at random numbers from the seed, B and the updates of vectors at zero.

    theta0 comes from the seed too, from a stream for every parameter name: uniform with variance `1 / fan_in` for the
    weights of linear and convolutional layers, 1 for the weights of norms, 0 for biases, uniform with a standard
    deviation of 0.02 for all else. An update is as large as theta0's standard deviation (0.1 for norm weights and
    biases) where the coefficients, times the factors of the scaled parametrization, are 1.

    Only `coefficients` is trained. It, the network's buffers (batch-norm statistics) and a record that identifies them
    are the state dict; loading one into a network of another seed, size or architecture raises a ValueError.

    Args:
        network: any module; its weights are dropped, and it is used as it is afterwards by this object alone. Buffers
            keep their values.
        config: `PrancConfig`, `McncConfig` or `NolaConfig`. The fields that place an adapter in a model
            (`target_modules` and others), and dropout, are ignored; `alpha` and NOLA's patterns must be left at their
            defaults where there are factors.
        keep_basis: keep PRANC's dense basis in memory, `num_coefficients` numbers for every parameter, instead of
            drawing it again twice a step.

    Raises:
        ValueError: another configuration, one whose coefficients or chunks are more than the parameters, or a rank that
            no parameter can have.
    """

    def __init__(self, network: nn.Module, config: SeededConfig, keep_basis: bool = False) -> None:
        super().__init__()
        self.config = config
        self._weights = tuple(weights_of(network))
        if not isinstance(config, SeededConfig):
            raise ValueError(
                f"`config` must be a NolaConfig, a PrancConfig or a McncConfig, got {type(config).__name__}."
            )
        self._fillings = config.network_fillings([weight.target for weight in self._weights], keep_basis)
        start = config.network_initial(self._fillings).float()
        self._slots = _take_parameters(network)
        self.network = network
        # transformers' Trainer looks at the signature of `forward`, which is the network's behind `*args, **kwargs`.
        parameters = inspect.signature(network.forward).parameters.values()
        self.accepts_loss_kwargs = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        self._initial = Frozen.shared(start_of, config.seed, self._weights, config.generator_version)
        self.coefficients = nn.ParameterDict({_ADAPTER: nn.Parameter(start)})
        self._expansions, first = [], 0
        for generator in self.generators:
            span = slice(first, first + generator.num_coefficients)
            self._expansions.append(SharedExpansion(generator, (generator.size,), _ADAPTER, span))
            self._expansions[-1].add(self.coefficients)
            first = span.stop
        self.register_load_state_dict_pre_hook(_verify)

    @property
    def generators(self) -> tuple[Generator, ...]:
        """What makes the updates; each reads the next part of the coefficients."""
        return tuple(filling.generator for filling in self._fillings)

    @property
    def identity(self) -> Identity:
        """All that turns the coefficients into weights."""
        return identity_of(self.config, self._weights, self._matrices)

    @property
    def _matrices(self) -> dict[str, list[int]]:
        return matrices_of([weight.target for weight in self._weights], self._fillings)

    def get_extra_state(self) -> torch.Tensor:
        """The record of the coefficients and buffers, which state dicts hold as `_extra_state`."""
        coefficients = self.coefficients[_ADAPTER]
        return _record(self.identity, "float32", len(coefficients), coefficients, persistent_buffers(self))

    def set_extra_state(self, state: Any) -> None:
        """Does nothing: what is loaded has been verified."""

    def weights(self) -> dict[str, torch.Tensor]:
        """The network's parameters by name, differentiable in the coefficients."""
        parts: dict[tuple[int, str], torch.Tensor] = {}
        for filling, expansion in zip(self._fillings, self._expansions):
            numbers = expansion(self.coefficients).split([part.size for part in filling.parts])
            parts |= {(part.place, part.kind): each.view(part.shape) for part, each in zip(filling.parts, numbers)}
        starts = self._initial.like(next(iter(parts.values()))).split([weight.size for weight in self._weights])
        return {
            weight.name: start.view(weight.shape) + self._update(parts, place) * weight.spread
            for place, (weight, start) in enumerate(zip(self._weights, starts))
        }

    def _update(self, parts: Mapping[tuple[int, str], torch.Tensor], place: int) -> torch.Tensor:
        """The update of a parameter, in its shape, from what was generated for it."""
        weight = self._weights[place]
        if (place, UPDATE) in parts:
            return parts[place, UPDATE].view(weight.shape)
        update = product(parts[place, B], parts[place, A], self.config.parametrization == SCALED)
        return (update.mT if weight.transposed else update).reshape(weight.shape)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """That of the network.

        Raises:
            ValueError: gradient checkpointing of the network is on: its weights are not there any more when the
                backward pass would compute its blocks again.
        """
        if self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.network.modules()):
            self.gradient_checkpointing_enable()
        with self._filled(self.weights()):
            return self.network(*args, **kwargs)

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> NoReturn:
        """Raises a ValueError: networks from a seed have no gradient checkpointing."""
        raise ValueError(
            "A network from a seed must be trained without gradient checkpointing (`gradient_checkpointing_disable()` "
            "of the network, `gradient_checkpointing=False` in TrainingArguments): its weights exist during the "
            "forward pass only. Smaller batches with gradient accumulation save memory too."
        )

    @contextmanager
    def _filled(self, weights: dict[str, torch.Tensor]) -> Iterator[None]:
        try:
            for module, attribute, name in self._slots:
                setattr(module, attribute, weights[name])
            yield
        finally:
            for module, attribute, _ in self._slots:
                setattr(module, attribute, None)

    def to_plain(self) -> nn.Module:
        """The network with ordinary parameters, frozen at their present values; a copy."""
        return self._with_parameters(copy.deepcopy(self.network))

    def unwrap(self) -> nn.Module:
        """The network itself, like `to_plain`; this object cannot be used afterwards."""
        return self._with_parameters(self.network)

    @torch.no_grad()
    def _with_parameters(self, network: nn.Module) -> nn.Module:
        """The wrapped network, or a copy of it, once it has ordinary parameters."""
        modules = dict(network.named_modules())
        names = {module: name for name, module in self.network.named_modules()}
        parameters = {name: nn.Parameter(value.clone(), requires_grad=False) for name, value in self.weights().items()}
        for module, attribute, name in self._slots:
            own = modules[names[module]]
            delattr(own, attribute)
            setattr(own, attribute, parameters[name])  # recurrent modules notice it, and keep a list of their own
        return network

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes coefficients and buffers to `model.safetensors`, seed and sizes to `seed_config.json`.

        The coefficients are saved in the `coefficient_dtype` of the configuration. The configuration of a network of
        transformers is written to `config.json` beside them, and a model card that describes all this to `README.md`;
        see `peft_ext.describe`.
        """
        self.config.check()  # the dtype can have been chosen since it was made
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.state_dict().items()}
        del state[_RECORD]
        dtype = self.config.coefficient_dtype
        coefficients = state.pop(NETWORK_COEFFICIENTS)
        buffers = {name: state[name] for name in persistent_buffers(self)}
        if quantization.is_integer(dtype):
            layout = self.config.layout([len(coefficients)])
            stored = state["packed"] = layout.pack([coefficients], dtype)
            after = layout.unpack(stored, dtype)
        else:
            stored = state[NETWORK_COEFFICIENTS] = quantization.cast(coefficients, dtype)
            after = [stored]
        state["identity"] = _record(self.identity, dtype, len(coefficients), stored, buffers)
        save_file(state, path / NETWORK_WEIGHTS_NAME, metadata={"format": "pt"})
        if isinstance(self.network, transformers.PreTrainedModel):
            self.network.config.architectures = [type(self.network).__name__]
            self.network.config.save_pretrained(path)
        fields = {**self.config.to_dict(), "coefficient_error": quantization.change([coefficients], after)}
        described = {
            "network": type(self.network).__name__,
            "network_config": digest_of_network_config(path),
            "weights": {weight.name: list(weight.shape) for weight in self._weights},
            **({"matrices": self._matrices} if self._matrices else {}),
            "method": {key: value for key, value in fields.items() if value is not None},
            "identity": self.identity.to_dict(),
        }
        (path / NETWORK_CONFIG_NAME).write_text(
            json.dumps(described, indent=1, default=_plain) + "\n", encoding="utf-8"
        )
        describe(path)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload network",
        create_pr: bool = False,
        **about: Any,
    ) -> CommitInfo:
        """Saves the network and uploads it with its model card to the Hugging Face hub; `load_from_seed` loads it.

        The text of a card that is in the repository at that revision is kept.

        Args:
            repo_id: `"user/name"`, or a name among your own. Made unless it is there.
            private: whether a new repository is private.
            token: of the hub; by default the one that is logged in.
            revision: the branch, by default main. A new one starts at main, as it is there.
            commit_message: its first line.
            create_pr: propose the commit in place of making it.
            **about: `license`, `datasets`, `metrics` and `tags` for the card, as in `peft_ext.describe`.

        Returns:
            The commit, which as a text is its address.
        """

        def save(folder: str, about: About) -> None:
            self.save_pretrained(folder)
            describe(folder, **vars(about))

        return upload(repo_id, save, About(**about), private, token, revision, commit_message, create_pr)


def digest_of_network_config(path: Path) -> str | None:
    """A hash of `config.json`, which decides more than shapes; None if there is none."""
    file = path / transformers.CONFIG_NAME
    if not file.is_file():
        return None
    return digest(canonical(json.loads(file.read_text(encoding="utf-8"))))


def identity_of(config: SeededConfig, weights: Sequence[Weight], matrices: Mapping[str, Sequence[int]]) -> Identity:
    """The parameters are known by their place in the sequence, name, shape and start, and the sides of matrices."""
    described = [
        [i, each.name, *each.shape, each.mean, each.width, each.spread, *matrices.get(each.name, ())]
        for i, each in enumerate(weights)
    ]
    return Identity(config.generating(), described)


def _record(
    identity: Identity, dtype: str, count: int, coefficients: torch.Tensor, buffers: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    return write_record(record_content(identity, dtype, count, [("coefficients", coefficients)], buffers.items()))


def _verify(module: Any, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Verifies a state dict before any of it reaches the network."""
    content = read_record(state_dict.get(prefix + _RECORD), _RECORD)
    check_identity(content.get("identity"), module.identity, "in the state dict")
    coefficients = state_dict.get(prefix + NETWORK_COEFFICIENTS)
    if coefficients is not None:
        check_checksum(content.get("coefficients"), checksum([("coefficients", coefficients)]), "the coefficients")
    buffers = {name: state_dict[prefix + name] for name in persistent_buffers(module) if prefix + name in state_dict}
    check_checksum(content.get("others"), checksum(buffers.items()), "the buffers")


def persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that state dicts hold, by name: tables that a network makes anew are none."""
    found = {}
    for name, buffer in module.named_buffers():
        place, _, own = name.rpartition(".")
        if own not in module.get_submodule(place)._non_persistent_buffers_set:
            found[name] = buffer
    return found


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _take_parameters(network: nn.Module) -> list[tuple[nn.Module, str, str]]:
    """Takes the parameters off a network: (module, attribute, name of the parameter) for every place of one."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    slots = [
        (module, attribute, names[id(parameter)])
        for module in network.modules()
        for attribute, parameter in module.named_parameters(recurse=False)
    ]
    for module, attribute, _ in slots:
        del module._parameters[attribute]
        setattr(module, attribute, None)
    return slots
