"""Checks of arguments: each raises a ValueError that names the argument, says what is allowed and what was given."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
import warnings
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


def declared_type(field: dataclasses.Field[Any]) -> str:
    """The type of a dataclass's field as text, that of an optional one without the None."""
    text = str(field.type)
    return text.removeprefix("Optional[").removesuffix("]") if text.startswith("Optional[") else text


def check_types(config: Any) -> None:
    """Raises a ValueError for the first field of a dataclass whose value is not of the type that it is declared with.

    Whole numbers count as numbers, lists as tuples and as sequences, and sets as lists; booleans are no numbers.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        if not _is_of(getattr(config, field.name), hints[field.name]):
            raise ValueError(
                f"`{field.name}` must be of type {declared_type(field)}, got {getattr(config, field.name)!r}."
            )


def _is_of(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_is_of(value, argument) for argument in arguments)
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is dict:
        return isinstance(value, dict) and all(
            _is_of(key, arguments[0]) and _is_of(item, arguments[1]) for key, item in value.items()
        )
    if origin is tuple and Ellipsis not in arguments:
        return (
            isinstance(value, (list, tuple))
            and len(value) == len(arguments)
            and all(_is_of(item, argument) for item, argument in zip(value, arguments))
        )
    if origin in (list, tuple, Sequence):
        return isinstance(value, (list, tuple, set)) and all(_is_of(item, arguments[0]) for item in value)
    return isinstance(value, origin or hint)


def default_of(config: Any, name: str) -> Any:
    """Returns what a field of a dataclass is unless it is given."""
    (declared,) = (each for each in dataclasses.fields(config) if each.name == name)
    return declared.default if declared.default_factory is dataclasses.MISSING else declared.default_factory()


def check_default(config: Any, name: str, why: str) -> None:
    """Raises a ValueError, which says why, if a field that has no meaning beside the others was changed."""
    default, value = default_of(config, name), getattr(config, name)
    if value != default:
        raise ValueError(f"`{name}` must be {default!r}, its default, {why}, got {value!r}.")


def warn_of_no_effect(config: Any, name: str, why: str) -> None:
    """Warns, and says why, if a field was changed that has no effect beside the others."""
    if getattr(config, name) != default_of(config, name):
        warnings.warn(f"`{name}` has no effect {why}.", stacklevel=6)  # where the configuration is made
