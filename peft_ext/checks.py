"""Checks of arguments: each raises a ValueError that names the argument, says what is allowed and what was given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_number(name: str, value: Any) -> None:
    """Raises a ValueError unless `value` is a finite number."""
    if not _is_number(value):
        raise ValueError(f"`{name}` must be a finite number, got {value!r}.")


def check_positive(name: str, value: Any) -> None:
    """Raises a ValueError unless `value` is a finite number above 0."""
    check_number(name, value)
    if value <= 0:
        raise ValueError(f"`{name}` must be above 0, got {value!r}.")


def check_not_negative(name: str, value: Any) -> None:
    """Raises a ValueError unless `value` is a finite number of at least 0."""
    check_number(name, value)
    if value < 0:
        raise ValueError(f"`{name}` must be at least 0, got {value!r}.")


def check_probability(name: str, value: Any) -> None:
    """Raises a ValueError unless `value` is a number from 0 to below 1."""
    if not _is_number(value) or not 0 <= value < 1:
        raise ValueError(f"`{name}` must be a number from 0 to below 1, got {value!r}.")


def check_share(name: str, value: Any) -> None:
    """Raises a ValueError unless `value` is a number above 0 and at most 1."""
    if not _is_number(value) or not 0 < value <= 1:
        raise ValueError(f"`{name}` must be a number above 0 and at most 1, got {value!r}.")


def check_positive_integer(name: str, value: Any) -> None:
    """Raises a ValueError unless `value` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")


def check_boolean(name: str, value: Any) -> None:
    """Raises a ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, got {value!r}.")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises a ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")
