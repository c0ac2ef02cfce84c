"""What turns coefficients into weights: described, hashed, written beside the coefficients and verified.

An adapter is a few numbers that mean other weights under another seed, rank or layer. Its *identity* is all of that:
the method, the version of the random numbers, the seed, every field of the configuration that generates weights, and
the names and shapes of the adapted modules. `adapter_config.json` holds it to be read, and the weights file holds it as
a small tensor, the *record*, since adapters are often loaded into one that was made from another configuration.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import randomness

FORMAT = 1
"""Version of the checkpoint format, see docs/checkpoint-format.md."""

RECORD_SIZE = 512
"""A record is filled up with spaces to a multiple of so many bytes."""

_DIGITS = 32  # hexadecimal digits that are kept of a SHA-256
_LONGEST = 96  # characters of a value in a record; a longer one is replaced by its hash


def canonical(value: Any) -> str:
    """JSON that is the same for equal values: keys sorted, no spaces, sets as sorted lists, 8.0 as 8."""
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def digest(data: str | bytes) -> str:
    """32 hexadecimal digits of the SHA-256 of some text or bytes."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:_DIGITS]


@dataclass(frozen=True)
class Identity:
    """All that turns the coefficients of an adapter into weights.

    Attributes:
        fields: the method's name, the generator version, the seed, and the generating fields of the configuration.
        modules: the adapted modules in the order of the model: name, and the numbers that its shape is known by.
    """

    fields: Mapping[str, Any]
    modules: Sequence[Sequence[Any]]

    def to_dict(self) -> dict[str, Any]:
        """What is saved: the fields, a hash of the modules, and the hash of both under `"sha256"`.

        The order of the modules counts: packed coefficients are known by their place.
        """
        described = {name: _shortened(value) for name, value in self.fields.items()}
        described["modules"] = digest(canonical(self.modules))
        return {"sha256": digest(canonical(described)), **described}


def _shortened(value: Any) -> Any:
    text = canonical(value)
    return _plain(value) if len(text) <= _LONGEST else f"sha256:{digest(text)}"


def check_identity(saved: Any, found: Identity | Mapping[str, Any], where: str) -> None:
    """Verifies that coefficients mean the weights that they meant when they were saved.

    Args:
        saved: what `Identity.to_dict` gave then.
        found: the identity now; or fields alone, if the modules are not known yet.
        where: what holds `saved`, for the message.

    Raises:
        ValueError: a field differs, with its name, what was saved and what was found; other modules; or `saved` is no
            identity.
    """
    if not isinstance(saved, Mapping) or not isinstance(saved.get("sha256"), str):
        raise ValueError(f"`identity` {where} must be a description of the adapter, got {str(saved)[:200]!r}.")
    described = {name: value for name, value in saved.items() if name != "sha256"}
    try:
        intact = digest(canonical(described)) == saved["sha256"]
    except (TypeError, ValueError):
        intact = False
    if isinstance(found, Identity):
        expected = found.to_dict()
    else:
        expected = {name: _shortened(value) for name, value in found.items()} | {"modules": described.get("modules")}
    names = (described.keys() | expected.keys()) - {"sha256", "modules"}
    # A version follows from fields: where one of those differs, it is the one to name.
    for name in sorted(names, key=lambda name: (name.endswith("_version"), name)):
        if name not in described or name not in expected or canonical(described[name]) != canonical(expected[name]):
            raise ValueError(
                f"`{name}` of the saved adapter was {described.get(name, 'not there')!r} {where}, and is "
                f"{expected.get(name, 'not there')!r} here: its coefficients would give other weights. Load the "
                "adapter with the configuration that was saved with it, unedited, and without a `config` of your own; "
                "where the model has an adapter of that name already, under another name. To start a new adapter from "
                "a saved configuration, set its `identity` to None."
            )
    if described.get("modules") != expected["modules"]:
        raise ValueError(
            "The saved adapter belongs to other modules: the hash of their names and shapes, in the order of the "
            f"model, {where} is {described.get('modules')!r}, and {expected['modules']!r} for the modules that "
            "`target_modules` matches here. Load the base model that the adapter was trained on (layer names can also "
            "differ between releases of transformers). To start a new adapter from a saved configuration, set its "
            "`identity` to None."
        )
    if not intact:
        raise ValueError(f"`identity` {where} was edited or is damaged: its hash does not fit its fields.")


# Names of modules


_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_NAMES = 1_000_000


def fold_names(names: Sequence[str]) -> list[str]:
    """Names of modules in fewer words: `"h.{0..11}.attn.{q,v}"` for 24 names, as a shell expands it, in that order.

    Raises:
        ValueError: a name holds a brace or a comma.
    """
    for name in names:
        if set(name) & set("{},"):
            raise ValueError(f"Names of adapted modules must not hold braces or commas, got {name!r}.")
    blocks: list[tuple[str, int | None, list[str]]] = []  # (before the first number, the number, what stands behind it)
    for name in names:
        match = re.search(r"(?<=\.)(0|[1-9]\d{0,6})(?=\.|$)", name)
        if match is None:
            blocks.append((name, None, [""]))
            continue
        before, number, behind = name[: match.start()], int(match.group()), name[match.end() :]
        if blocks and blocks[-1][:2] == (before, number):
            blocks[-1][2].append(behind)
        else:
            blocks.append((before, number, [behind]))
    folded = []
    while blocks:
        start, first, ends = blocks.pop(0)
        if first is None:
            folded.append(start)
            continue
        last: int = first
        while blocks and blocks[0] == (start, last + 1, ends):
            blocks.pop(0)
            last += 1
        numbers = str(first) if first == last else f"{{{first}..{last}}}"
        common = os.path.commonprefix(ends) if len(ends) > 1 else ends[0]
        if len(ends) > 1:
            common = common[: common.rfind(".") + 1]
            common += f"{{{','.join(end.removeprefix(common) for end in ends)}}}"
        folded.append(start + numbers + common)
    return folded


def unfold_names(folded: Any) -> list[str]:
    """What `fold_names` folded.

    Raises:
        ValueError: it did not fold this, or there are more than a million names.
    """
    if not isinstance(folded, (list, tuple)) or not all(isinstance(name, str) for name in folded):
        raise ValueError(f"`target_names` must be a list of names, got {str(folded)[:200]!r}.")
    names = []
    for text in folded:
        match = _BRACES.search(text)
        numbers: Iterable[str] = [""]
        before, rest = (text[: match.start()], text[match.end() :]) if match else ("", text)
        if match:
            first, last = int(match[1]), int(match[2])
            if last - first > _MOST_NAMES:
                raise ValueError(f"`target_names` must stand for at most {_MOST_NAMES:,} names, got {text!r}.")
            numbers = map(str, range(first, last + 1))
        head, _, tail = rest.partition("{")
        choices = tail.removesuffix("}").split(",") if tail else [""]
        names += [f"{before}{number}{head}{choice}" for number in numbers for choice in choices]
        if len(names) > _MOST_NAMES:
            raise ValueError(f"`target_names` must stand for at most {_MOST_NAMES:,} names.")
    return names


# The record in the weights file


def numbered(vectors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Vectors of coefficients by the labels of their checksum: their places, which stay when modules are renamed."""
    return {f"coefficients {index}": vector for index, vector in enumerate(vectors)}


def unnamed(tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """Tensors with labels for a checksum that stay when modules are renamed: the last parts of their names."""
    return [(name.rpartition(".")[2], tensor) for name, tensor in tensors.items()]


def record_content(
    identity: Identity,
    dtype: str,
    count: int,
    coefficients: Iterable[tuple[str, torch.Tensor]],
    others: Iterable[tuple[str, torch.Tensor]],
) -> dict[str, Any]:
    """What the record of an adapter or a network says.

    Args:
        identity: all that turns the coefficients into weights.
        dtype: what they are saved in.
        count: how many they are.
        coefficients: as they are saved, each with a label.
        others: what is saved beside them, each with a label.
    """
    return {
        "format": FORMAT,
        "identity": identity.to_dict(),
        "dtype": dtype,
        "count": count,
        "coefficients": checksum(coefficients),
        "others": checksum(others),
    }


def write_record(content: Mapping[str, Any]) -> torch.Tensor:
    """A record as a tensor: canonical JSON in UTF-8, filled up with spaces: uint8 of a multiple of `RECORD_SIZE`."""
    data = canonical(content).encode()
    data += b" " * (-len(data) % RECORD_SIZE)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def read_record(tensor: torch.Tensor | None, name: str) -> dict[str, Any]:
    """What `write_record` wrote.

    Args:
        name: of the tensor in the file, for messages.

    Raises:
        ValueError: there is no such tensor, it is no record, or a newer release wrote it.
    """
    if tensor is None:
        raise ValueError(
            f"The saved adapter holds no {name!r}, which says what its coefficients mean. It was not saved by this "
            "release of peft_ext, or tensors were taken out: save it again with `save_pretrained`."
        )
    try:
        if tensor.dtype != torch.uint8 or tensor.dim() != 1 or tensor.numel() > 1 << 20:
            raise ValueError(f"it is {tensor.dtype} of shape {tuple(tensor.shape)}")
        content = json.loads(bytes(tensor.cpu().numpy()).decode())
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name!r} of the saved adapter is damaged: {str(error)[:200]}.") from error
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{name!r} must have format {FORMAT} (what this release of peft_ext reads), got "
            f"{str(content.get('format'))[:50]!r}. If a newer release saved the adapter, upgrade peft_ext."
        )
    return content


def checksum(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """32 hexadecimal digits that any changed bit of some tensors changes.

    Args:
        tensors: each with a label. Their order does not matter; equal labels are allowed.
    """
    lines = []
    for label, tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        kind = str(tensor.dtype).removeprefix("torch.")
        lines.append(f"{label} {kind} {list(tensor.shape)} {digest(data)}")
    return digest("\n".join(sorted(lines)))


def check_checksum(saved: Any, found: str, what: str) -> None:
    """Raises a ValueError unless a checksum is the saved one; `what` it is of, for the message."""
    if saved != found:
        raise ValueError(
            f"The checksum of {what} is {found!r}, and {saved!r} was saved: the file is damaged, or tensors were "
            "changed after saving."
        )


# Other checks


def check_fingerprint(seed: int, version: Any, expected: str | None) -> None:
    """Verifies that a seed means the numbers that it meant when an adapter was saved.

    Raises:
        ValueError: an unknown `generator_version`, or other numbers.
    """
    version = randomness.check_version(version)
    if expected is None:
        return
    found = randomness.fingerprint(seed, version)
    if found != expected:
        raise ValueError(
            f"`fingerprint` must be {found!r} for seed {seed} and generator_version {version}, got {expected!r}. The "
            "checkpoint was made with other random numbers, so its coefficients would give other weights here: the "
            "seed or the fingerprint in adapter_config.json was edited, or this installation generates wrong numbers "
            "(its tests tell)."
        )


def check_target_shapes(saved: Mapping[str, int] | None, found: Mapping[str, int]) -> None:
    """Verifies that a model has the layers that an adapter was saved for; coefficients alone do not show it.

    Raises:
        ValueError: the numbers of adapted layers by shape (out x in) differ.
    """
    if saved is not None and dict(saved) != dict(found):
        raise ValueError(
            f"`target_shapes` of the saved adapter ({describe_shapes(saved)}) does not fit the model, where "
            f"`target_modules` matches {describe_shapes(found)}. Load the base model that the adapter was trained on "
            "(layer names can also differ between releases of transformers). To start a new adapter from a saved "
            "configuration, set its `target_shapes` and `identity` to None."
        )


def shape_name(fan_out: int, fan_in: int, experts: int = 1) -> str:
    """The name of a layer's shape in a checkpoint: `"out x in"`, or `"out x in x experts"` of a stack."""
    return f"{fan_out} x {fan_in}" + (f" x {experts}" if experts > 1 else "")


def parse_shape(name: str) -> tuple[int, int, int]:
    """(fan_out, fan_in, experts) of what `shape_name` made."""
    fan_out, fan_in, experts = (*map(int, name.split(" x ")), 1)[:3]
    return fan_out, fan_in, experts


def describe_shapes(shapes: Mapping[str, int]) -> str:
    """`{"out x in": number of layers}` as words."""
    words = {shape: f"{shape} experts" if shape.count(" x ") == 2 else shape for shape in shapes}
    return ", ".join(f"{number} layers of {words[shape]}" for shape, number in sorted(shapes.items())) or "no layers"


def check_finite(coefficients: torch.Tensor, where: str = "") -> None:
    """Raises a ValueError, which says `where`, if coefficients hold NaN or infinity."""
    if not coefficients.is_meta and not torch.isfinite(coefficients).all():
        raise ValueError(
            f"The coefficients of an adapter must be finite, got NaN or infinity{where}. The checkpoint is damaged, or "
            "the training that wrote it diverged."
        )
