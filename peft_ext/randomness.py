"""Portable randomness: (seed, stream, position) -> the same float32 bits on every machine and library version.

A checkpoint that holds a seed instead of weights depends on every number made here, so the specification is frozen.
Version 1:

1. The *stream* is a tuple of strings and integers that says what the numbers are for, such as
   ``("nola", "A", 8, 576)``. ``json.dumps(["peft_ext", 1, *stream], separators=(",", ":"))`` is hashed with
   SHA-256; the first 8 bytes, little-endian, are the 64-bit stream key.
2. ``numpy.random.Philox(key=(seed, stream key))`` (Philox4x64-10; Salmon et al., "Parallel random numbers: as easy
   as 1, 2, 3", 2011) gives 64-bit words. NumPy promises this raw output across releases, unlike its distributions.
3. Each 64-bit word is two 32-bit words, low half first. A word ``w`` becomes ``(w >> 8) * 2**-23 - 1`` in float32:
   exact, uniform on the multiples of 2**-23 in [-1, 1).

Any change is a new version; versions that were ever released stay readable.
"""

from __future__ import annotations

import hashlib
import json
import operator
from typing import Any

import numpy as np
import torch

GENERATOR_VERSION = 1
"""The version of the specification above that new adapters are made with."""

_WORDS_PER_COUNTER = 8  # one Philox4x64 counter step is four 64-bit words
_CHUNK = 1 << 20  # numbers drawn at a time: bounds the temporary memory to a few MiB


def check_seed(seed: Any) -> int:
    """Returns `seed` as an `int`.

    Raises:
        ValueError: `seed` is not an integer between 0 and 2**64 - 1.
    """
    try:
        value = operator.index(seed)
    except TypeError:
        value = -1
    if isinstance(seed, bool) or not 0 <= value < 2**64:
        raise ValueError(f"`seed` must be an integer between 0 and 2**64 - 1, got {seed!r}.")
    return value


def check_version(version: Any) -> int:
    """Returns `version` if this release can generate its numbers.

    Raises:
        ValueError: the version is unknown, with what to do about it.
    """
    if isinstance(version, bool) or version != GENERATOR_VERSION:
        raise ValueError(
            f"`generator_version` must be {GENERATOR_VERSION} (what this release of peft_ext can generate), got "
            f"{version!r}. If a newer release saved this adapter, upgrade peft_ext."
        )
    return int(version)


def uniform(
    seed: int, stream: tuple[str | int, ...], count: int, start: int = 0, version: int = GENERATOR_VERSION
) -> torch.Tensor:
    """Numbers `start` to `start + count` of a stream, uniform on [-1, 1).

    The result is independent of how a range is cut into calls, of thread counts and of torch's default dtype, default
    device, inference mode and generators.

    Args:
        seed: 0 to 2**64 - 1.
        stream: what the numbers are for; different streams are independent.
        count: how many numbers.
        start: position of the first number in the stream.
        version: of the specification in this module's docstring.

    Returns:
        A float32 CPU tensor of shape `(count,)`.

    Raises:
        ValueError: a seed out of range or an unknown version.
    """
    name = json.dumps(["peft_ext", check_version(version), *stream], separators=(",", ":"))
    stream_key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    bits = np.random.Philox(key=np.array([check_seed(seed), stream_key], dtype=np.uint64))
    bits.advance(start // _WORDS_PER_COUNTER)
    skip = start % _WORDS_PER_COUNTER

    numbers = np.empty(count, dtype=np.float32)
    done = 0
    while done < count:
        # Whole counter steps only, so that the next draw continues where this one ends.
        words = min(_CHUNK, -(-(skip + count - done) // _WORDS_PER_COUNTER) * _WORDS_PER_COUNTER)
        raw = bits.random_raw(words // 2).astype("<u8", copy=False).view("<u4")[skip:]
        take = min(len(raw), count - done)
        part = numbers[done : done + take]
        np.multiply(raw[:take] >> np.uint32(8), np.float32(2**-23), out=part, dtype=np.float32, casting="unsafe")
        part -= np.float32(1)
        done, skip = done + take, 0
    # A tensor made under inference mode could not be saved for a backward pass later.
    with torch.inference_mode(False):
        return torch.from_numpy(numbers)


def fingerprint(seed: int, version: int = GENERATOR_VERSION) -> str:
    """16 hexadecimal digits of the SHA-256 of the first 1,024 numbers of stream `("fingerprint",)`.

    Saved beside a seed, it shows on another machine that the seed still means the same numbers.
    """
    numbers = uniform(seed, ("fingerprint",), 1024, version=version).numpy()
    return hashlib.sha256(numbers.astype("<f4").tobytes()).hexdigest()[:16]
