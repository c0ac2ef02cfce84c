"""What a checkpoint says beside its coefficients, and how that and the coefficients are verified."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .. import randomness


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
            "configuration, set its `target_shapes` to None."
        )


def shape_name(fan_out: int, fan_in: int) -> str:
    """The name of a layer's shape in a checkpoint: `"out x in"`."""
    return f"{fan_out} x {fan_in}"


def parse_shape(name: str) -> tuple[int, int]:
    """(fan_out, fan_in) of what `shape_name` made."""
    fan_out, fan_in = map(int, name.split(" x "))
    return fan_out, fan_in


def describe_shapes(shapes: Mapping[str, int]) -> str:
    """`{"out x in": number of layers}` as words."""
    return ", ".join(f"{number} layers of {shape}" for shape, number in sorted(shapes.items())) or "no layers"


def check_coefficients(
    state_dict: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Size],
    marker: str,
    size_fields: tuple[str, ...],
) -> None:
    """Verifies the coefficients in a loaded state dict before any of them reaches the model.

    Args:
        state_dict: keys as in the model.
        expected: shapes of the coefficients that the model has for the adapter.
        marker: what the names of coefficients contain.
        size_fields: fields of the configuration that the shapes depend on.

    Raises:
        ValueError: missing or unknown coefficients, other shapes, or values that are not finite.
    """
    missing = sorted(expected.keys() - state_dict.keys())
    unknown = sorted(key for key in state_dict if marker in key and key not in expected)
    if missing or unknown:
        raise ValueError(
            f"The saved adapter does not fit the model: {len(missing)} adapted layers find no coefficients"
            + (f" (first: {missing[0]!r})" if missing else "")
            + f" and {len(unknown)} saved coefficients find no layer"
            + (f" (first: {unknown[0]!r})" if unknown else "")
            + ". Check the base model and `target_modules`; layer names can differ between releases of transformers."
        )
    for key, shape in expected.items():
        if state_dict[key].shape != shape:
            raise ValueError(
                f"The saved adapter does not fit its configuration: {key!r} must have shape {tuple(shape)}, got "
                f"{tuple(state_dict[key].shape)}. {' and '.join(f'`{field}`' for field in size_fields)} in "
                "adapter_config.json must be what it was trained with."
            )
        check_finite(state_dict[key], f" in {key!r}")


def check_finite(coefficients: torch.Tensor, where: str = "") -> None:
    """Raises a ValueError, which says `where`, if coefficients hold NaN or infinity."""
    if not torch.isfinite(coefficients).all():
        raise ValueError(
            f"The coefficients of an adapter must be finite, got NaN or infinity{where}. The checkpoint is damaged, or "
            "the training that wrote it diverged."
        )
