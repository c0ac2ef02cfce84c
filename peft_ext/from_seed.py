"""Rebuilds whole networks from a seed and coefficients."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig
from safetensors.torch import load_file
from torch import nn

from .checkpoint import quantization
from .checkpoint.hub import local_folder
from .checkpoint.identity import check_checksum, check_finite, check_identity, checksum, read_record
from .checks import check_choice
from .seeded_network import (
    NETWORK_COEFFICIENTS,
    SeededNetwork,
    digest_of_network_config,
    identity_of,
    persistent_buffers,
)
from .tuners.config import PLAIN, SeededConfig
from .tuners.description import NETWORK_CONFIG_NAME, NETWORK_WEIGHTS_NAME
from .tuners.network import Weight, matrices_of, saved_targets, weights_of
from .tuners.target import Target


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
        network: a network of the same architecture, whatever its weights, which are replaced; it is the one that is
            returned. May be left out for the classes of transformers, which are made from `config.json`.
        revision: branch, tag or commit of the repository.
        token: of the hub; by default the one that is logged in.

    Returns:
        The network with ordinary frozen parameters, in evaluation mode.

    Raises:
        ValueError: another architecture, an unknown generator version or other random numbers, coefficients that do
            not fit or are not finite, or no `network` where one is needed. `network` is then unchanged.
        FileNotFoundError: neither a folder nor what could be the id of a repository.
    """
    path = local_folder(folder, (NETWORK_CONFIG_NAME, NETWORK_WEIGHTS_NAME, transformers.CONFIG_NAME), revision, token)
    described, config, targets = read_config(path)
    state = load_file(path / NETWORK_WEIGHTS_NAME)
    content = read_record(state.pop("identity", None), "identity")
    saved, name = described["weights"], described["network"]

    def verify(network: nn.Module) -> None:
        weights = list(weights_of(network))
        _check_weights(saved, name, weights)
        own = [weight.target for weight in weights]
        matrices = matrices_of(own, config.network_fillings(own))
        identity = identity_of(config, weights, matrices)
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
    buffers = {f"network.{key}": buffer for key, buffer in persistent_buffers(network).items()}
    check_choice(f"dtype in {NETWORK_WEIGHTS_NAME}", content.get("dtype"), quantization.DTYPES)
    size = sum(filling.generator.num_coefficients for filling in config.network_fillings(targets))
    found = "packed" if quantization.is_integer(content["dtype"]) else NETWORK_COEFFICIENTS
    expected = {key: buffer.shape for key, buffer in buffers.items()}
    shapes = {key: tensor.shape for key, tensor in state.items() if key != "packed" or found != "packed"}
    if found != "packed":
        expected = {NETWORK_COEFFICIENTS: torch.Size([size]), **expected}
    if shapes != expected:
        raise ValueError(
            f"{NETWORK_WEIGHTS_NAME} does not fit {NETWORK_CONFIG_NAME}: it must hold "
            f"{', '.join(f'{key} {tuple(shape)}' for key, shape in expected.items())}."
        )
    if found not in state:
        raise ValueError(f"{NETWORK_WEIGHTS_NAME} must hold {found!r} for coefficients in {content['dtype']}.")
    check_finite(state[found], f" in {NETWORK_WEIGHTS_NAME}")
    check_checksum(content.get("coefficients"), checksum([("coefficients", state[found])]), f"{found!r}")
    others = {key: tensor for key, tensor in state.items() if key != found}
    check_checksum(content.get("others"), checksum(others.items()), "the buffers")
    if found == "packed":
        (vector,) = config.layout([size]).unpack(state[found], content["dtype"])
    else:
        vector = state[found]
    seeded = SeededNetwork(network, config)  # takes the parameters off: all is verified
    with torch.no_grad():
        for parameter in seeded.coefficients.values():
            parameter.copy_(vector)
        for key, buffer in buffers.items():
            buffer.copy_(state[key])
    return seeded.unwrap().eval()


def read_config(path: Path) -> tuple[dict[str, Any], SeededConfig, list[Target]]:
    """What `seed_config.json` of a folder says, and the configuration and the parameters in it.

    Raises:
        ValueError: it is damaged, or no configuration of a network.
    """
    try:
        described = json.loads((path / NETWORK_CONFIG_NAME).read_text(encoding="utf-8"))
        weights, method, identity = described["weights"], described["method"], described["identity"]
        shapes = [[int(size) for size in shape] for shape in weights.values()]
        named = isinstance(described["network"], str) and isinstance(identity["sha256"], str)
        if not named or any(size < 0 for shape in shapes for size in shape):
            raise ValueError("a name, a hash or a shape is none")
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


def _check_network_config(path: Path, described: Mapping[str, Any]) -> None:
    found = digest_of_network_config(path)
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
