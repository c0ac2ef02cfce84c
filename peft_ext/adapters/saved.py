"""Saved adapters and networks, read and verified without a model."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file

from .. import from_seed
from ..checkpoint import quantization
from ..checkpoint.card import CARD_NAME
from ..checkpoint.hub import local_folder
from ..checkpoint.identity import (
    Identity,
    check_checksum,
    check_finite,
    check_identity,
    checksum,
    numbered,
    parse_shape,
    read_record,
    unfold_names,
    unnamed,
)
from ..seeded_network import NETWORK_COEFFICIENTS
from ..tuners.config import CheckpointedConfig
from ..tuners.description import NETWORK_CONFIG_NAME, NETWORK_WEIGHTS_NAME
from ..tuners.surroundings import PREFIX, is_copy
from ..tuners.target import Target, together
from ..tuners.target_parameters import owners_of

_MOST_GUESSES = 5_000
_FILES = (
    *(CARD_NAME, CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME),
    *(NETWORK_CONFIG_NAME, NETWORK_WEIGHTS_NAME, transformers.CONFIG_NAME),
)
_BESIDE = ("*.json", "*.jinja", "*.md", "*.model", "*.tiktoken", "*.txt")  # tokenizers and other small files


@dataclass
class Saved:
    """An adapter or a network in a folder, with what its files say.

    Attributes:
        folder: where it is.
        config: its configuration.
        described: what `seed_config.json` of a network says; nothing for an adapter.
        record: what the record in the weights file says.
        targets: the adapted modules, or the parameters of a network.
        shapes_known: whether every target has its own shape: a file tells how many have which, and a hash of all.
        vectors: names of the tensors of coefficients, in the order of the model.
        packed: name of the tensor that holds the coefficients in a few bits each.
        record_name: name of the record.
        tensors: what is in the weights file.
    """

    folder: Path
    config: Any
    described: Mapping[str, Any]
    record: dict[str, Any]
    targets: list[Target]
    shapes_known: bool
    vectors: list[str]
    packed: str
    record_name: str
    tensors: dict[str, torch.Tensor]

    @property
    def is_network(self) -> bool:
        return bool(self.described)

    @property
    def weights_path(self) -> Path:
        return self.folder / (NETWORK_WEIGHTS_NAME if self.is_network else SAFETENSORS_WEIGHTS_NAME)

    @property
    def identity(self) -> dict[str, Any]:
        """What turns the coefficients into weights, as the configuration says it."""
        return self.described["identity"] if self.is_network else self.config.identity

    @property
    def dtype(self) -> str:
        """What the coefficients are saved in."""
        return str(self.record.get("dtype"))

    @property
    def others(self) -> dict[str, torch.Tensor]:
        """What is in the file beside the coefficients and the record."""
        known = {*self.vectors, self.packed, self.record_name}
        return {name: tensor for name, tensor in self.tensors.items() if name not in known}

    @property
    def sizes(self) -> list[int]:
        """Numbers in every vector of coefficients; in an order of their own unless `shapes_known`."""
        if self.is_network:
            fillings = self.config.network_fillings(self.targets)
            return [sum(filling.generator.num_coefficients for filling in fillings)]
        return self.config.vector_sizes(self.targets)

    def coefficients(self) -> list[torch.Tensor]:
        """The vectors, in float32, or float64 if they were saved in it; unpacked in the order of `sizes`.

        Raises:
            ValueError: they do not fit the configuration.
        """
        if quantization.is_integer(self.dtype):
            return self.layout().unpack(self.tensors[self.packed], self.dtype)
        return [
            self.tensors[name].to(torch.promote_types(self.tensors[name].dtype, torch.float32)) for name in self.vectors
        ]

    def layout(self) -> quantization.Layout:
        """How the vectors are packed. (Vectors of several sizes can be in any order: kinds are joined end to end.)"""
        return self.config.layout(self.sizes)

    def labelled(self, tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
        """Coefficients, by name, as their checksum sees them."""
        if self.packed in tensors:
            return [("coefficients" if self.is_network else "packed", tensors[self.packed])]
        if self.is_network:
            return [("coefficients", tensors[self.vectors[0]])]
        return list(numbered([tensors[name] for name in self.vectors]).items())


def read(place: str | os.PathLike[str], revision: str | None = None, complete: bool = False) -> Saved:
    """Reads an adapter or a network from a folder or from the hub.

    Args:
        place: a folder, or the id of a repository on the hub.
        revision: branch, tag or commit of a repository.
        complete: download also what a repository holds beside the checkpoint, such as the files of a tokenizer.

    Raises:
        FileNotFoundError: no folder or repository, one that holds neither, or the revision of a folder.
        ValueError: a file is damaged, the configuration does not fit its identity, or there are both.
    """
    folder = local_folder(place, _FILES + _BESIDE if complete else _FILES, revision, None)
    if (folder / CONFIG_NAME).is_file() and (folder / NETWORK_CONFIG_NAME).is_file():
        raise ValueError(
            f"{str(place)!r} holds an adapter ({CONFIG_NAME}) and a network from a seed ({NETWORK_CONFIG_NAME}), and "
            "nothing says which of them is meant: put them into two folders."
        )
    if (folder / CONFIG_NAME).is_file():
        return _read_adapter(folder)
    if (folder / NETWORK_CONFIG_NAME).is_file():
        return _read_network(folder)
    raise FileNotFoundError(
        f"{str(place)!r} holds neither an adapter ({CONFIG_NAME}) nor a network from a seed ({NETWORK_CONFIG_NAME})."
    )


def _read_adapter(folder: Path) -> Saved:
    try:
        method = PeftConfig._get_peft_type(str(folder))
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{str(folder / CONFIG_NAME)!r} is damaged, or of no method of PEFT: {error!r}.") from error
    if not isinstance(config, CheckpointedConfig):
        raise FileNotFoundError(f"{str(folder)!r} holds an adapter of {method}, which is no method of peft_ext.")
    if config.identity is None or config.target_names is None:
        raise ValueError(f"{str(folder / CONFIG_NAME)!r} is the configuration of no saved adapter: it has no identity.")
    tensors = _load(folder / SAFETENSORS_WEIGHTS_NAME)
    names = unfold_names(config.target_names)
    targets, known = _targets(config, names)
    layer = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].tuner_layer_cls  # type: ignore[index]
    ends = layer.adapter_layer_names[0]
    owners = owners_of(names, getattr(config, "target_parameters", None) or [])
    record_name, packed = (f"{PREFIX}{owners[0]}.{config.method()}_{kind}" for kind in ("identity", "packed"))
    vectors = [f"{PREFIX}{name}.{ends}.values" for name in owners[: len(config.vector_sizes(targets))]]
    record = read_record(tensors.get(record_name), record_name)
    return Saved(folder, config, {}, record, targets, known, vectors, packed, record_name, tensors)


def _read_network(folder: Path) -> Saved:
    described, config, targets = from_seed.read_config(folder)
    tensors = _load(folder / NETWORK_WEIGHTS_NAME)
    record = read_record(tensors.get("identity"), "identity")
    return Saved(
        folder, config, described, record, targets, True, [NETWORK_COEFFICIENTS], "packed", "identity", tensors
    )


def _load(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no {str(path)!r}.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}.") from error


def _targets(config: CheckpointedConfig, names: list[str]) -> tuple[list[Target], bool]:
    """The adapted modules, and whether their shapes are known.

    The file tells how many modules have a shape, and a hash of names and shapes. Where shapes depend on the last part
    of a name, or on its last two, as in transformers, the hash tells which.
    """
    shapes = config.target_shapes or {}
    if not names or sum(shapes.values()) != len(names):
        raise ValueError(
            f"`target_shapes` must count the {len(names)} modules that `target_names` stands for, got "
            f"{sum(shapes.values())}."
        )
    try:
        sizes = {parse_shape(shape): number for shape, number in shapes.items()}
    except ValueError as error:
        raise ValueError(f"`target_shapes` must have keys like '32 x 16', got {list(shapes)[:5]!r}.") from error
    assert config.identity is not None
    with_biases = bool(getattr(config, "adapt_bias", False))
    choices = [
        (out, columns, bias, experts)
        for out, columns, experts in sizes
        for bias in ((0, out) if with_biases and experts == 1 else (0,))
    ]
    for parts in (1, 2):
        end_of = {name: tuple(name.split(".")[-parts:]) for name in names}
        ends = Counter(end_of.values())
        if len(choices) ** len(ends) > _MOST_GUESSES:
            break
        for guess in itertools.product(choices, repeat=len(ends)):
            counts: Counter[tuple[int, int, int]] = Counter()
            for shape, number in zip(guess, ends.values()):
                counts[(*shape[:2], shape[3])] += number
            if counts != sizes:
                continue
            by_end = dict(zip(ends, guess))
            targets = [Target(name, *by_end[end_of[name]]) for name in names]
            found = Identity(config.generating(), [config.described(target) for target in targets]).to_dict()
            if found["modules"] == config.identity.get("modules"):
                return together(targets), True
    every = [size for size, number in sizes.items() for _ in range(number)]
    if len(sizes) == 1 and not with_biases:
        raise ValueError("`target_names` or `target_shapes` was edited: the hash of both in `identity` is another.")
    targets = [Target(name, out, columns, 0, experts) for name, (out, columns, experts) in zip(names, every)]
    return together(targets), False


def verify(saved: Saved) -> list[str]:
    """Verifies all of a checkpoint that can be verified without a model.

    Returns:
        What was verified, a sentence each.

    Raises:
        ValueError: something is wrong.
    """
    where = NETWORK_CONFIG_NAME if saved.is_network else CONFIG_NAME
    check_identity(saved.identity, saved.config.generating(), f"in {where}")
    check_identity(saved.record.get("identity"), saved.config.generating(), "in the weights file")
    if saved.record["identity"] != saved.identity:
        raise ValueError(
            "The configuration and the weights file belong to different modules: the hash of their names and shapes "
            f"is {saved.identity.get('modules')!r} in {where} and "
            f"{saved.record['identity'].get('modules')!r} in the weights file."
        )
    told = [
        f"Every generating field is that of the identity {saved.identity['sha256']}, in {where} and in the weights."
    ]
    if getattr(saved.config, "fingerprint", None) is not None:  # verified when the configuration was read
        told.append(f"Seed {saved.config.seed} means the same random numbers here.")
    if saved.shapes_known and not saved.is_network:
        told.append(f"The names and shapes of the {len(saved.targets)} adapted modules are those that were saved.")
    _check_coefficients(saved)
    told.append(f"{sum(saved.sizes):,} coefficients in {saved.dtype} are there, finite, and have the saved checksum.")
    strangers = _check_others(saved)
    if len(saved.others) > len(strangers):
        told.append(f"{len(saved.others) - len(strangers)} tensors beside them have the saved checksum.")
    return told


def _check_coefficients(saved: Saved) -> None:
    if saved.dtype not in quantization.DTYPES:
        raise ValueError(f"`dtype` in {saved.record_name!r} must be one of {quantization.DTYPES}, got {saved.dtype!r}.")
    names = [saved.packed] if quantization.is_integer(saved.dtype) else saved.vectors
    missing = [name for name in names if name not in saved.tensors]
    unknown = [name for name in (saved.packed, *saved.vectors) if name in saved.tensors and name not in names]
    if missing or unknown:
        surplus = f" and not {unknown[0]!r}" if unknown else ""
        raise ValueError(
            f"The weights file must hold {(missing or names)[0]!r}{surplus} for coefficients in {saved.dtype}."
        )
    sizes = saved.sizes
    if saved.record.get("count") != sum(sizes):
        raise ValueError(f"`count` in {saved.record_name!r} must be {sum(sizes)}, got {saved.record.get('count')!r}.")
    for name in names:
        tensor = saved.tensors[name]
        if name == saved.packed:
            saved.layout().unpack(tensor, saved.dtype)
        elif not tensor.is_floating_point() or tensor.numel() not in sizes:
            raise ValueError(
                f"{name!r} must hold {sizes[0]} numbers, got {tensor.dtype} of shape {tuple(tensor.shape)}."
            )
        else:
            check_finite(tensor, f" in {name!r}")
    if names == saved.vectors and sorted(saved.tensors[name].numel() for name in names) != sorted(sizes):
        raise ValueError("The coefficients do not fit the shapes of the modules in `target_shapes`.")
    found = checksum(saved.labelled({name: saved.tensors[name] for name in names}))
    check_checksum(saved.record.get("coefficients"), found, "the coefficients")
    for index, vector in enumerate(saved.coefficients()):
        check_finite(vector, f" in vector {index}")


def _check_others(saved: Saved) -> list[str]:
    """Names of the tensors that only a base model can tell about, in a file whose others are those that were saved."""
    others = saved.others
    if saved.is_network:
        check_checksum(saved.record.get("others"), checksum(others.items()), "the buffers")
        return []
    strangers = unexplained(saved)
    beside = {name: tensor for name, tensor in others.items() if name not in strangers}
    check_checksum(saved.record.get("others"), checksum(unnamed(beside)), "what is saved beside the coefficients")
    if beside:
        found = checksum((name.removeprefix(PREFIX), tensor) for name, tensor in beside.items())
        check_checksum(saved.record.get("named"), found, "what is saved beside the coefficients and its names")
    return strangers


def unexplained(saved: Saved) -> list[str]:
    """Names of tensors that are neither coefficients nor biases nor of modules in `modules_to_save`.

    PEFT saves such tensors with adapted embeddings and resized ones. They must be equal to those of the base model,
    which loading verifies, or are copies of what is in the file anyway.
    """
    if saved.is_network:
        return []
    modules = set(getattr(saved.config, "modules_to_save", None) or ())
    biases = getattr(saved.config, "bias", "none") != "none"
    return [
        name
        for name in saved.others
        if not (biases and name.endswith(".bias"))
        and (is_copy(name) or not modules & set(name.removeprefix(PREFIX).split(".")))
    ]
