"""How much a configuration, which can be a stranger's, may ask for before anything is made."""

from __future__ import annotations

from collections.abc import Sequence

from .target import Target

MULTIPLE = 16
"""A configuration may ask for so many times what the adapted weights are, in numbers and in memory."""

_SMALL = 1 << 26  # bytes that any configuration may ask for


def check_memory(fields: str, what: str, numbers: int, targets: Sequence[Target]) -> None:
    """Raises a ValueError if some float32 numbers are out of proportion to the adapted weights, before they are made.

    Args:
        fields: of the configuration that ask for them, for the message.
        what: they are.
        numbers: how many.
    """
    most = max(_SMALL, 4 * MULTIPLE * sum(target.size for target in targets))
    if 4 * numbers > most:
        raise ValueError(
            f"{fields} must be in proportion to the adapted modules: {what} would take {4 * numbers:,} bytes, at most "
            f"{most:,} are allowed ({MULTIPLE} times the {len(targets)} adapted weights, or 64 MiB)."
        )


def check_rank(r: int, numbers: int, targets: Sequence[Target]) -> None:
    """Raises a ValueError if factors of rank `r`, of so many numbers, are out of proportion to the adapted weights."""
    widest = max(max(target.fan_out, target.fan_in) for target in targets)
    check_multiple("r", r, widest, "columns or rows of the largest module")
    check_memory("`r`", "the factors", numbers, targets)


def check_multiple(field: str, value: int, size: int, what: str) -> None:
    """Raises a ValueError if a number of a configuration is more than `MULTIPLE` times a size of the model."""
    if value > MULTIPLE * size:
        raise ValueError(
            f"`{field}` must be at most {MULTIPLE * size:,}, {MULTIPLE} times the {size:,} {what}, got {value:,}."
        )
