"""Coefficients in a few bits each: symmetric integers in groups that share a scale."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

DTYPES = ("float32", "bfloat16", "float16", "int8", "int4")
"""What coefficients can be saved in."""

GROUP = 128
"""Numbers that share a scale."""

_LARGEST = {"int8": 127, "int4": 7}


def is_integer(dtype: str) -> bool:
    """Whether coefficients of a dtype of `DTYPES` are packed into bytes by `encode`."""
    return dtype in _LARGEST


def cast(coefficients: torch.Tensor, dtype: str) -> torch.Tensor:
    """Coefficients in a floating-point dtype of `DTYPES`; those in float64 lose nothing.

    Raises:
        ValueError: a number is too large for it.
    """
    if coefficients.dtype == torch.float64:
        return coefficients
    found = coefficients.to(getattr(torch, dtype))
    if torch.isinf(found).sum() > torch.isinf(coefficients).sum():
        largest = float(coefficients.abs().max())
        raise ValueError(f"Coefficients of up to {largest:.3g} are infinite in {dtype}: save them in another dtype.")
    return found


def size_of(sizes: Sequence[int], dtype: str) -> int:
    """Bytes that `encode` makes of parts of these lengths."""
    groups = sum(-(-size // GROUP) for size in sizes)
    return groups * (GROUP * (1 if dtype == "int8" else 4) // (1 if dtype == "int8" else 8) + 2)


def encode(parts: Sequence[torch.Tensor], dtype: str) -> torch.Tensor:
    """Packs numbers into bytes.

    Each part is filled up with zeros to whole groups of `GROUP` numbers. A group has the scale `m / L`, rounded to
    bfloat16, for its largest absolute value m and L = 127 (int8) or 7 (int4); a number x becomes the integer
    `round(x / scale)` between -L and L. All integers come first, in two's complement, int4 two to a byte with the
    first one in the low bits; then all scales, little-endian.

    Args:
        parts: vectors of numbers of one kind each, so that no group mixes kinds.
        dtype: `"int8"` or `"int4"`.

    Returns:
        uint8 of shape `(size_of(lengths, dtype),)`.

    Raises:
        ValueError: a number is not finite.
    """
    largest = _LARGEST[dtype]
    groups = torch.cat([_grouped(part.detach().cpu().float()) for part in parts])
    if not torch.isfinite(groups).all():
        raise ValueError(f"Coefficients must be finite to be saved in {dtype}, got NaN or infinity.")
    scales = (groups.abs().amax(1) / largest).bfloat16()
    divisors = scales.float().masked_fill(scales == 0, 1.0)
    codes = (groups / divisors[:, None]).round().clamp(-largest, largest).to(torch.int8).flatten()
    if dtype == "int4":
        low, high = (codes & 15).view(-1, 2).unbind(1)
        codes = low | (high << 4)
    return torch.cat((codes.view(torch.uint8), scales.view(torch.uint8)))


def decode(packed: torch.Tensor, sizes: Sequence[int], dtype: str) -> list[torch.Tensor]:
    """The numbers that `encode` packed, in float32.

    Args:
        packed: uint8.
        sizes: lengths of the parts.
        dtype: `"int8"` or `"int4"`.

    Raises:
        ValueError: `packed` has another length or dtype.
    """
    expected = size_of(sizes, dtype)
    if packed.dtype != torch.uint8 or packed.shape != (expected,):
        raise ValueError(
            f"Coefficients in {dtype} must be {expected} bytes for {sum(sizes)} numbers, got {packed.dtype} of shape "
            f"{tuple(packed.shape)}."
        )
    counts = [-(-size // GROUP) for size in sizes]
    packed = packed.detach().cpu()
    scales = packed[expected - 2 * sum(counts) :].clone().view(torch.bfloat16).float()
    codes = packed[: expected - 2 * sum(counts)].clone().view(torch.int8)
    if dtype == "int4":
        codes = torch.stack(((codes << 4) >> 4, codes >> 4), 1).flatten()
    numbers = codes.view(-1, GROUP).float() * scales[:, None]
    return [part.flatten()[:size] for part, size in zip(numbers.split(counts), sizes)]


def change(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> float | None:
    """Norm of the difference relative to that of what was there before, or None if nothing changed."""
    exact, found = (torch.cat([each.detach().flatten().double().cpu() for each in some]) for some in (before, after))
    return None if torch.equal(exact, found) else float((found - exact).norm() / exact.norm())


class Layout:
    """The order in which vectors of coefficients are packed: all numbers of the first kind, then all of the next.

    Args:
        kinds: of every vector, the places of its numbers of each kind; each vector has as many kinds.
    """

    def __init__(self, kinds: Sequence[Sequence[torch.Tensor]]) -> None:
        self._kinds = kinds
        self.sizes = [sum(map(len, places)) for places in zip(*kinds)]

    def _places(self) -> Iterator[tuple[int, torch.Tensor]]:
        for places in zip(*self._kinds):
            yield from enumerate(places)

    def pack(self, vectors: Sequence[torch.Tensor], dtype: str) -> torch.Tensor:
        """The vectors as bytes, see `encode`."""
        gathered = torch.cat([vectors[index].flatten().cpu()[places] for index, places in self._places()])
        return encode(gathered.split(self.sizes), dtype)

    def unpack(self, packed: torch.Tensor, dtype: str) -> list[torch.Tensor]:
        """The vectors that `pack` packed, in float32."""
        numbers = torch.cat(decode(packed, self.sizes, dtype))
        vectors = [torch.empty(sum(map(len, places)), dtype=torch.float32) for places in self._kinds]
        parts = numbers.split([len(places) for _, places in self._places()])
        for (index, places), part in zip(self._places(), parts):
            vectors[index][places] = part
        return vectors


def _grouped(part: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(part.flatten(), (0, -part.numel() % GROUP)).view(-1, GROUP)
