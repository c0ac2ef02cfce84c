"""Scaling the updates of single adapters, by the methods that LoRA's layers have for it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence

from ..checks import check_number


def is_unscaled(scales: Iterable[float]) -> bool:
    """Whether the scales of an adapter in its layers are 1, but for rounding."""
    return all(math.isclose(scale, 1) for scale in scales)


def warn_of_scales(adapter: str, scales: Sequence[float]) -> None:
    """Warns that an adapter which is saved has other scales in its layers than it will have when it is loaded."""
    if is_unscaled(scales):
        return
    low, high = min(scales), max(scales)
    told = f"{low:g}" if math.isclose(low, high) else f"from {low:g} to {high:g} in its layers"
    warnings.warn(
        f"Adapter {adapter!r} is saved without its scale, {told}: a loaded adapter has the one that its configuration "
        "says. Scale it again after loading (`set_scale` of the layers), or merge it into the model to keep the scale.",
        stacklevel=3,
    )


class ScaledLayer:
    """A layer whose adapters have a scaling that can be changed, as LoRA's have.

    Scales belong to the process: they are neither in a configuration nor in a checkpoint.

    Attributes:
        scaling: what the updates are multiplied by, by adapter name.
        initial_scaling: what it was when the adapter was made, which its configuration says.
        merged_adapters: those whose updates are in the base weight. Their scaling cannot change.
    """

    scaling: dict[str, float]
    initial_scaling: dict[str, float]
    merged_adapters: list[str]
    active_adapters: list[str]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Makes the scaling of an adapter `scale` times what its configuration says.

        An adapter that this layer does not have is left out: adapters can adapt different layers.

        Raises:
            ValueError: `scale` is no finite number, or the adapter is merged.
        """
        check_number("scale", scale)
        if adapter in self.scaling:
            self._rescale({adapter: scale * self.initial_scaling[adapter]})

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scaling of the active adapters by a factor.

        Raises:
            ValueError: `scale` is no finite number, or an active adapter is merged.
        """
        check_number("scale", scale)
        self._rescale({adapter: self.scaling[adapter] * scale for adapter in self._active()})

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the scaling of the active adapters by a factor, or by default makes it what it was at first.

        Raises:
            ValueError: `scale` is no finite number or 0, or an active adapter is merged.
        """
        if scale is None:
            return self._rescale({adapter: self.initial_scaling[adapter] for adapter in self._active()})
        check_number("scale", scale)
        if scale == 0:
            raise ValueError(
                "`scale` must not be 0, which nothing can be divided by. `unscale_layer()` without it puts the scaling "
                "back to what it was at first."
            )
        self._rescale({adapter: self.scaling[adapter] / scale for adapter in self._active()})

    def scale_of(self, adapter: str) -> float:
        """The scaling of an adapter relative to what its configuration says: 1 unless it was changed."""
        initial = self.initial_scaling[adapter]
        return self.scaling[adapter] / initial if initial else 1.0

    def _active(self) -> list[str]:
        return [adapter for adapter in self.active_adapters if adapter in self.scaling]

    def _rescale(self, scaling: dict[str, float]) -> None:
        changed = {adapter: value for adapter, value in scaling.items() if value != self.scaling[adapter]}
        for adapter in changed:
            if adapter in self.merged_adapters:
                raise ValueError(
                    f"The scale of adapter {adapter!r} cannot change while it is merged: it would have no effect, and "
                    "unmerging would take off another update than was added. Unmerge it first (`unmerge_adapter()`, "
                    "in diffusers `unfuse_lora()`), then scale and merge again."
                )
        self.scaling.update(changed)
