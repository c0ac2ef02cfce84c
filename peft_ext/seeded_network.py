"""Whole networks from a seed and coefficients, without base weights: what PRANC and MCNC were published for."""

from __future__ import annotations

import copy
import inspect
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import CommitInfo
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from . import randomness
from .checkpoint.card import About
from .checkpoint.hub import local_folder, upload
from .checkpoint.identity import check_finite
from .generators.base import Frozen
from .tuners.config import SeededConfig, Target
from .tuners.description import NETWORK_CONFIG_NAME, NETWORK_WEIGHTS_NAME, describe
from .tuners.expansion import SharedExpansion

_ADAPTER = "network"
_VECTOR_SPREAD = 0.1  # of updates of norm weights and biases, which start at 1 and 0


class _Weight(NamedTuple):
    """A parameter: starts uniform on `mean` +- `width`; updates of the size of the coefficients are times `spread`."""

    name: str
    shape: tuple[int, ...]
    mean: float
    width: float
    spread: float

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class SeededNetwork(nn.Module):
    """A network whose parameters are random numbers plus an update: `theta0 + spread * generator(coefficients)`.

    The parameters are flattened into one sequence, in their order in the network, and filled by one generator
    (PRANC, arXiv 2206.08464, equation 1; MCNC, arXiv 2406.19301, section 3), so that chunks and coefficients do not
    end at layers. The sparse basis gives every coefficient equally many weights of the whole network.

    theta0 comes from the seed too, from a stream for every parameter name: uniform with variance `1 / fan_in` for the
    weights of linear and convolutional layers, 1 for the weights of norms, 0 for biases, uniform with a standard
    deviation of 0.02 for all else. An update is as large as theta0's standard deviation where the coefficients are 1
    (0.1 for norm weights and biases).

    Only `coefficients` is trained. It and the network's buffers (batch-norm statistics) are the state dict.

    Args:
        network: any module; its weights are dropped, and it is used as it is afterwards by this object alone. Buffers
            keep their values.
        config: `PrancConfig`, or `McncConfig` with `apply_to="weight"`. The fields that place an adapter in a model
            (`target_modules` and others), and dropout, are ignored.
        keep_basis: keep PRANC's dense basis in memory, `num_coefficients` numbers for every parameter, instead of
            drawing it again twice a step.

    Raises:
        ValueError: another configuration, or one whose coefficients or chunks are more than the parameters.
    """

    def __init__(self, network: nn.Module, config: SeededConfig, keep_basis: bool = False) -> None:
        super().__init__()
        self.config = config
        self._weights = tuple(_weights(network))
        size = sum(weight.size for weight in self._weights)
        if not isinstance(config, SeededConfig):
            raise ValueError(f"`config` must be a PrancConfig or a McncConfig, got {type(config).__name__}.")
        self.generator = config.network_generator(size, keep_basis)
        start = config.initial(Target("", size, 1), (self.generator,))
        self._slots = _take_parameters(network)
        self.network = network
        # transformers' Trainer looks at the signature of `forward`, which is the network's behind `*args, **kwargs`.
        parameters = inspect.signature(network.forward).parameters.values()
        self.accepts_loss_kwargs = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        self._initial = Frozen.shared(_initial, config.seed, self._weights, config.generator_version)
        self.coefficients = nn.ParameterDict({_ADAPTER: nn.Parameter(start)})
        self._expansion = SharedExpansion(self.generator, (size,), _ADAPTER, slice(0, self.generator.num_coefficients))
        self._expansion.add(self.coefficients)

    def weights(self) -> dict[str, torch.Tensor]:
        """The network's parameters by name, differentiable in the coefficients."""
        flat = self._expansion(self.coefficients)
        sizes = [weight.size for weight in self._weights]
        parts = zip(self._weights, self._initial.like(flat).split(sizes), flat.split(sizes))
        return {weight.name: (start + part * weight.spread).view(weight.shape) for weight, start, part in parts}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """That of the network."""
        with self._filled(self.weights()):
            return self.network(*args, **kwargs)

    @contextmanager
    def _filled(self, weights: dict[str, torch.Tensor]) -> Iterator[None]:
        try:
            for module, attribute, name in self._slots:
                setattr(module, attribute, weights[name])
            yield
        finally:
            for module, attribute, _ in self._slots:
                setattr(module, attribute, None)

    @torch.no_grad()
    def to_plain(self) -> nn.Module:
        """The network with ordinary parameters, frozen at their present values; a copy."""
        network = copy.deepcopy(self.network)
        modules = dict(network.named_modules())
        names = {module: name for name, module in self.network.named_modules()}
        parameters = {name: nn.Parameter(value.clone(), requires_grad=False) for name, value in self.weights().items()}
        for module, attribute, name in self._slots:
            own = modules[names[module]]
            delattr(own, attribute)
            own.register_parameter(attribute, parameters[name])
        return network

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes coefficients and buffers to `model.safetensors`, seed and sizes to `seed_config.json`.

        The configuration of a network of transformers is written to `config.json` beside them, and a model card that
        describes all this to `README.md`; see `peft_ext.describe`.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.state_dict().items()}
        save_file(state, path / NETWORK_WEIGHTS_NAME, metadata={"format": "pt"})
        described = {
            "network": type(self.network).__name__,
            "weights": {weight.name: list(weight.shape) for weight in self._weights},
            "method": {key: value for key, value in self.config.to_dict().items() if value is not None},
        }
        (path / NETWORK_CONFIG_NAME).write_text(
            json.dumps(described, indent=1, default=_plain) + "\n", encoding="utf-8"
        )
        if isinstance(self.network, transformers.PreTrainedModel):
            self.network.config.architectures = [type(self.network).__name__]
            self.network.config.save_pretrained(path)
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


def load_from_seed(
    folder: str | os.PathLike[str],
    network: nn.Module | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> nn.Module:
    """Rebuilds a network that `SeededNetwork.save_pretrained` or `SeededNetwork.push_to_hub` wrote.

    Args:
        folder: where it was written, or the id of a repository on the hub, `"user/name"`, of which nothing but seed,
            coefficients and the configuration of the network is downloaded.
        network: a network of the same architecture, whatever its weights, which are replaced. May be left out for
            the classes of transformers, which are made from `config.json`.
        revision: branch, tag or commit of the repository.
        token: of the hub; by default the one that is logged in.

    Returns:
        The network with ordinary frozen parameters, in evaluation mode.

    Raises:
        ValueError: another architecture, an unknown generator version or other random numbers, coefficients that do
            not fit or are not finite, or no `network` where one is needed.
        FileNotFoundError: neither a folder nor what could be the id of a repository.
    """
    path = local_folder(folder, (NETWORK_CONFIG_NAME, NETWORK_WEIGHTS_NAME, "config.json"), revision, token)
    described = json.loads((path / NETWORK_CONFIG_NAME).read_text(encoding="utf-8"))
    config = PeftConfig.from_peft_type(**described["method"])
    network = _make_network(path, described["network"]) if network is None else network
    found = {weight.name: list(weight.shape) for weight in _weights(network)}
    saved = described["weights"]
    if found != saved:
        differing = sorted(name for name in found.keys() | saved.keys() if found.get(name) != saved.get(name))
        raise ValueError(
            f"`network` must be the {described['network']} that was saved: {len(differing)} parameters differ, the "
            f"first is {differing[0]!r} with shape {saved.get(differing[0])} in the checkpoint and "
            f"{found.get(differing[0])} in the network given."
        )
    seeded = SeededNetwork(network, config)
    state = load_file(path / NETWORK_WEIGHTS_NAME)
    expected = {name: tensor.shape for name, tensor in seeded.state_dict().items()}
    if {name: tensor.shape for name, tensor in state.items()} != expected:
        raise ValueError(
            f"{NETWORK_WEIGHTS_NAME} does not fit {NETWORK_CONFIG_NAME}: it must hold "
            f"{', '.join(f'{name} {tuple(shape)}' for name, shape in expected.items())}."
        )
    check_finite(state[f"coefficients.{_ADAPTER}"], f" in {NETWORK_WEIGHTS_NAME}")
    seeded.load_state_dict(state)
    return seeded.to_plain().eval()


def _make_network(path: Path, name: str) -> nn.Module:
    network_class = getattr(transformers, name, None)
    if not (isinstance(network_class, type) and issubclass(network_class, transformers.PreTrainedModel)):
        raise ValueError(f"`network` must be given: {name!r} is no class of transformers, so only you can make it.")
    return network_class(transformers.AutoConfig.from_pretrained(path))  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _weights(network: nn.Module) -> Iterator[_Weight]:
    owners = {
        id(p): (module, name) for module in network.modules() for name, p in module.named_parameters(recurse=False)
    }
    for name, parameter in network.named_parameters():
        module, attribute = owners[id(parameter)]
        shape = tuple(parameter.shape)
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd, Conv1D)) and attribute == "weight":
            fan_in = shape[0] if isinstance(module, Conv1D) else parameter[0].numel()
            yield _Weight(name, shape, 0.0, math.sqrt(3 / fan_in), 1 / math.sqrt(fan_in))
        elif len(shape) == 1:
            yield _Weight(name, shape, 1.0 if attribute == "weight" else 0.0, 0.0, _VECTOR_SPREAD)
        else:
            yield _Weight(name, shape, 0.0, 0.02 * math.sqrt(3), 0.02)


def _initial(seed: int, weights: tuple[_Weight, ...], version: int) -> torch.Tensor:
    flat = torch.empty(sum(weight.size for weight in weights))
    for weight, part in zip(weights, flat.split([weight.size for weight in weights])):
        part.fill_(weight.mean)
        if weight.width:
            part.add_(randomness.uniform(seed, ("network", weight.name), weight.size, 0, version), alpha=weight.width)
    return flat


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
