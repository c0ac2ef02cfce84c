"""The log of a ledger: entries that each hold the hash of the one before, and a file with a checksum for them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

VERSION = 3
Entry = dict[str, Any]
Chain = tuple[Entry, ...]

_FIRST = {"previous", "time", "seconds", "remaining", "targets", "state", "settings"}
_LATER = {"previous", "time", "seconds", "samples", "shift", "remaining", "targets", "forgotten", "state"}
_START, _AFTER = b'{\n"checksum": "', b'",\n'
_DIGITS = 64  # of a SHA-256


def line(entry: Entry) -> str:
    """Returns an entry as one line of JSON, with sorted names and without spaces: what its hash is taken of."""
    return json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False)


def entry_hash(entry: Entry) -> str:
    """Returns the SHA-256 of an entry's line, in hexadecimal digits."""
    return hashlib.sha256(line(entry).encode()).hexdigest()


def extended(chain: Chain, entry: Entry) -> Chain:
    """Returns a chain with one more entry, which gets the hash of the last one as `previous`."""
    return (*chain, {**entry, "previous": entry_hash(chain[-1]) if chain else None})


def commitment(salt: str, keys: Iterable[str]) -> str:
    """Returns a SHA-256 that binds hashes of samples and, without the salt, tells nothing about them.

    It is that of the salt and of the hashes in alphabetical order, a line each, without a line break at the end.

    Args:
        salt: random hexadecimal digits.
        keys: hashes of samples, in hexadecimal digits.
    """
    return hashlib.sha256("\n".join([salt, *sorted(keys)]).encode()).hexdigest()


def broken_links(chain: Sequence[Entry]) -> list[str]:
    """Returns what is wrong with a chain, a sentence for each entry that does not follow from the one before."""
    found: list[str] = []
    for number, entry in enumerate(chain):
        expected = entry_hash(chain[number - 1]) if number else None
        names = _LATER if number else _FIRST
        if not isinstance(entry, dict) or set(entry) != names:
            return [*found, f"entry {number} does not have the fields {', '.join(sorted(names))}"]
        if entry["previous"] != expected:
            found.append(f"entry {number} follows {entry['previous']}, and the one before it has the hash {expected}")
        counts = [entry[name] for name in ("remaining", "targets", "samples") if name in entry]
        if not all(isinstance(count, int) and count > 0 for count in counts):
            return [*found, f"entry {number} has the numbers {counts} of samples and targets, which must be above 0"]
        if number and entry["remaining"] != chain[number - 1]["remaining"] - entry["samples"]:
            found.append(f"entry {number} leaves {entry['remaining']} samples, which does not add up")
    return found if chain else ["it has no entry"]


def encoded(chain: Chain) -> bytes:
    """Returns the content of a ledger's file: a checksum of all that follows its own line, and an entry a line."""
    entries = ",\n".join(map(line, chain))
    rest = f'"version": {VERSION},\n"chain": [\n{entries}\n]\n}}\n'.encode()
    return _START + hashlib.sha256(rest).hexdigest().encode() + _AFTER + rest


def decoded(data: bytes) -> Chain:
    """Returns the chain that `encoded` wrote.

    Raises:
        ValueError: a byte is not as it was written, the version is another one, or the chain is broken; the message
            continues a sentence that begins with the file's name.
    """
    begin = len(_START) + _DIGITS + len(_AFTER)
    claimed, rest = data[len(_START) : begin - len(_AFTER)], data[begin:]
    found = hashlib.sha256(rest).hexdigest()
    whole = data[:begin] == _START + claimed + _AFTER and claimed == found.encode()
    try:
        record = json.loads(data)
        version = record["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"is damaged: {error!r}.") from error
    if not whole and not (data.startswith(_START) or version == VERSION):
        raise ValueError(
            f"has version {version!r}, whose settings no checksum covers; this release of peft_ext reads {VERSION}. "
            "Serve its requests with the release that wrote it, or `create` a ledger in another folder from the "
            "adapter and the samples that remain."
        )
    if not whole:
        raise ValueError(
            f"is damaged: the SHA-256 of what follows its checksum is {found}, which is not written there."
        )
    if version != VERSION:
        raise ValueError(f"has version {version!r}; this release of peft_ext reads {VERSION}.")
    if set(record) != {"checksum", "version", "chain"} or not isinstance(record["chain"], list):
        raise ValueError("is damaged: it must hold a checksum, a version and a chain, and nothing else.")
    broken = broken_links(record["chain"])
    if broken:
        raise ValueError(f"is damaged: {broken[0]}.")
    return tuple(record["chain"])
