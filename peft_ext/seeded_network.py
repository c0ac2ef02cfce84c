"""Whole networks from a seed and coefficients, without base weights: what PRANC and MCNC were published for."""

from __future__ import annotations

import copy
import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import CommitInfo
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from torch import nn

from .checkpoint import quantization
from .checkpoint.card import About
from .checkpoint.hub import local_folder, upload
from .checkpoint.identity import (
    Identity,
    canonical,
    check_checksum,
    check_finite,
    check_identity,
    checksum,
    digest,
    read_record,
    record_content,
    write_record,
)
from .checks import check_choice
from .generators import Generator
from .generators.base import Frozen
from .tuners.config import PLAIN, SCALED, SeededConfig
from .tuners.description import NETWORK_CONFIG_NAME, NETWORK_WEIGHTS_NAME, describe
from .tuners.expansion import SharedExpansion
from .tuners.network import UPDATE, A, B, Weight, matrices_of, product, saved_targets, start_of, weights_of
from .tuners.target import Target

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
        return _identity(self.config, self._weights, self._matrices)

    @property
    def _matrices(self) -> dict[str, list[int]]:
        return matrices_of([weight.target for weight in self._weights], self._fillings)

    def get_extra_state(self) -> torch.Tensor:
        """The record of the coefficients and buffers, which state dicts hold as `_extra_state`."""
        buffers = {name: buffer for name, buffer in self.named_buffers()}
        coefficients = self.coefficients[_ADAPTER]
        return _record(self.identity, "float32", len(coefficients), coefficients, buffers)

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

        The coefficients are saved in the `coefficient_dtype` of the configuration. The configuration of a network of
        transformers is written to `config.json` beside them, and a model card that describes all this to `README.md`;
        see `peft_ext.describe`.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.state_dict().items()}
        del state[_RECORD]
        dtype = self.config.coefficient_dtype
        coefficients = state.pop(NETWORK_COEFFICIENTS)
        buffers = {name: state[name] for name, _ in self.named_buffers() if name in state}
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
            "network_config": _digest_of_network_config(path),
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
    path = local_folder(folder, (NETWORK_CONFIG_NAME, NETWORK_WEIGHTS_NAME, transformers.CONFIG_NAME), revision, token)
    described, config, _ = read_config(path)
    state = load_file(path / NETWORK_WEIGHTS_NAME)
    content = read_record(state.pop("identity", None), "identity")
    saved, name = described["weights"], described["network"]

    def verify(network: nn.Module) -> None:
        weights = list(weights_of(network))
        _check_weights(saved, name, weights)
        targets = [weight.target for weight in weights]
        matrices = matrices_of(targets, config.network_fillings(targets))
        identity = _identity(config, weights, matrices)
        check_identity(described["identity"], identity, f"in {NETWORK_CONFIG_NAME}")
        check_identity(content.get("identity"), identity, f"in {NETWORK_WEIGHTS_NAME}")
        if matrices != described.get("matrices", {}):
            raise ValueError(f"`matrices` in {NETWORK_CONFIG_NAME} must be those of the {name}: it was edited.")

    if network is None:
        _check_network_config(path, described)
        with torch.device("meta"):  # before a stranger's sizes cost memory
            verify(_make_network(path, name))
        with _float32():
            network = _make_network(path, name)
    verify(network)
    seeded = SeededNetwork(network, config)
    coefficients = seeded.coefficients[_ADAPTER]
    check_choice(f"dtype in {NETWORK_WEIGHTS_NAME}", content.get("dtype"), quantization.DTYPES)
    found = "packed" if quantization.is_integer(content["dtype"]) else NETWORK_COEFFICIENTS
    kept = seeded.state_dict().keys()
    expected = {key: buffer.shape for key, buffer in seeded.named_buffers() if key in kept}
    shapes = {key: tensor.shape for key, tensor in state.items() if key != "packed" or found != "packed"}
    if found != "packed":
        expected = {NETWORK_COEFFICIENTS: coefficients.shape, **expected}
    if shapes != expected:
        raise ValueError(
            f"{NETWORK_WEIGHTS_NAME} does not fit {NETWORK_CONFIG_NAME}: it must hold "
            f"{', '.join(f'{key} {tuple(shape)}' for key, shape in expected.items())}."
        )
    if found not in state:
        raise ValueError(f"{NETWORK_WEIGHTS_NAME} must hold {found!r} for coefficients in {content['dtype']}.")
    check_finite(state[found], f" in {NETWORK_WEIGHTS_NAME}")
    buffers = {key: tensor for key, tensor in state.items() if key != found}
    check_checksum(content.get("coefficients"), checksum([("coefficients", state[found])]), f"{found!r}")
    check_checksum(content.get("others"), checksum(buffers.items()), "the buffers")
    with torch.no_grad():
        if found == "packed":
            (vector,) = config.layout([len(coefficients)]).unpack(state[found], content["dtype"])
        else:
            vector = state[found]
        coefficients.copy_(vector)
        for key, buffer in seeded.named_buffers():
            if key in buffers:
                buffer.copy_(buffers[key])
    return seeded.to_plain().eval()


def read_config(path: Path) -> tuple[dict[str, Any], SeededConfig, list[Target]]:
    """What `seed_config.json` of a folder says, and the configuration and the parameters in it.

    Raises:
        ValueError: it is damaged, or no configuration of a network.
    """
    try:
        described = json.loads((path / NETWORK_CONFIG_NAME).read_text(encoding="utf-8"))
        weights, method, identity = described["weights"], described["method"], described["identity"]
        shapes = [[int(size) for size in shape] for shape in weights.values()]
        if not isinstance(described["network"], str) or any(size < 0 for shape in shapes for size in shape):
            raise ValueError("a name or a shape is none")
        targets = saved_targets(dict(zip(weights, shapes)), described.get("matrices", {}))
        # Networks from before there was a choice name none.
        chosen = {"parametrization": PLAIN, "factors_version": identity.get("factors_version")}
        config = PeftConfig.from_peft_type(**{**chosen, **method})
    except (AttributeError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{str(path / NETWORK_CONFIG_NAME)!r} is damaged: {error!r}.") from error
    if not isinstance(config, SeededConfig):
        kind = method.get("peft_type")
        raise ValueError(f"`peft_type` in {NETWORK_CONFIG_NAME} must be a method that makes networks, got {kind!r}.")
    config.network_fillings(targets)  # whether it makes networks, and has fewer coefficients than parameters
    return described, config, targets


def _digest_of_network_config(path: Path) -> str | None:
    """A hash of `config.json`, which decides more than shapes; None if there is none."""
    file = path / transformers.CONFIG_NAME
    if not file.is_file():
        return None
    return digest(canonical(json.loads(file.read_text(encoding="utf-8"))))


def _check_network_config(path: Path, described: Mapping[str, Any]) -> None:
    found = _digest_of_network_config(path)
    if found is not None and found != described.get("network_config"):
        raise ValueError(
            f"{transformers.CONFIG_NAME} is not the one that was saved: its hash is {found!r}, and "
            f"{str(described.get('network_config'))[:50]!r} in {NETWORK_CONFIG_NAME}. It was edited or is damaged."
        )


def _check_weights(saved: Mapping[str, Any], name: str, weights: Sequence[Weight]) -> None:
    found = {weight.name: list(weight.shape) for weight in weights}
    if found != saved:
        differing = sorted(each for each in found.keys() | saved.keys() if found.get(each) != saved.get(each))
        raise ValueError(
            f"`network` must be the {name} that was saved: {len(differing)} parameters differ, the first is "
            f"{differing[0]!r} with shape {saved.get(differing[0])} in the checkpoint and {found.get(differing[0])} in "
            "the network given."
        )


def _identity(config: SeededConfig, weights: Sequence[Weight], matrices: Mapping[str, Sequence[int]]) -> Identity:
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
    buffers = {name: state_dict[prefix + name] for name, _ in module.named_buffers() if prefix + name in state_dict}
    check_checksum(content.get("others"), checksum(buffers.items()), "the buffers")


@contextmanager
def _float32() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)


def _make_network(path: Path, name: str) -> nn.Module:
    network_class = getattr(transformers, name, None)
    if not (isinstance(network_class, type) and issubclass(network_class, transformers.PreTrainedModel)):
        raise ValueError(f"`network` must be given: {name!r} is no class of transformers, so only you can make it.")
    return network_class(transformers.AutoConfig.from_pretrained(path))  # type: ignore[arg-type]


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
