"""Reading data for sums over it: every sample once in all processes together, known by a hash of its content."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import GradientState
from accelerate.utils import gather_object, reduce

from ...randomness import uniform
from ...training.batch import Batch

Loader = Iterable[Mapping[str, Any] | Batch]


def batches(loader: Loader, device: torch.device) -> Iterator[Batch]:
    """Yields the samples of a loader that this process has to add up.

    Accelerate fills the last batch of a prepared loader up with samples that have been seen; they are left out.

    Args:
        loader: gives dicts with `labels` and the other arguments of the model, each either a tensor with a row for
            every sample or something to be passed on as it is; or gives what this function gave.
        device: where the samples are wanted.

    Raises:
        ValueError: a batch is no dict, or has no `labels`; or the loader can be read only once.
    """
    if isinstance(loader, Iterator):
        raise ValueError(
            f"The loader must be one that can be read several times, such as a DataLoader or a list of batches, got a "
            f"{type(loader).__name__}, which is empty after the first time."
        )
    gradient_state = GradientState()
    others = gradient_state.dataloader_references  # of a Trainer that is still there, for one
    for values in loader:
        if isinstance(values, Batch):
            yield values.to(device)
            continue
        if not isinstance(values, Mapping) or not isinstance(values.get("labels"), torch.Tensor):
            raise ValueError(
                "The loader must give dicts of the model's arguments with a tensor 'labels' among them, got "
                + (f"the keys {sorted(values)}" if isinstance(values, Mapping) else f"a {type(values).__name__}")
                + "."
            )
        size = len(values["labels"])
        tensors = {
            name: value
            for name, value in values.items()
            if isinstance(value, torch.Tensor) and value.dim() and len(value) == size
        }
        batch = Batch(tensors, {name: value for name, value in values.items() if name not in tensors})
        prepared = gradient_state.active_dataloader
        ours = prepared is loader or all(prepared is not other for other in others)  # or one that the loader reads
        if prepared is not None and ours and prepared.end_of_dataloader and prepared.remainder > 0:
            first = PartialState().process_index * size
            batch = batch.select(slice(0, max(0, min(prepared.remainder - first, size))))
        if len(batch):
            yield batch.to(device)


@dataclass
class Chain:
    """A loader that reads several loaders, one after the other.

    Attributes:
        loaders: what `batches` takes, each.
    """

    loaders: Sequence[Loader]

    def __iter__(self) -> Iterator[Mapping[str, Any] | Batch]:
        for loader in self.loaders:
            yield from loader


@dataclass
class Selection:
    """A loader of those samples of another loader whose hashes are among some, or are not.

    Attributes:
        loader: what `batches` takes.
        keys: the hashes.
        without: whether the samples with other hashes are meant.
    """

    loader: Loader
    keys: Container[str]
    without: bool = False

    def __iter__(self) -> Iterator[Batch]:
        for batch in batches(self.loader, torch.device("cpu")):
            rows = [row for row, key in enumerate(batch.keys()) if (key in self.keys) != self.without]
            if rows:
                yield batch.select(rows)


def total(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the sum of a tensor over all processes, in each of them."""
    return reduce(tensor, "sum") if PartialState().num_processes > 1 else tensor


def gathered(values: list[Any]) -> list[Any]:
    """Returns the items of all processes, in each of them."""
    return gather_object(values) if PartialState().num_processes > 1 else values


def sample_keys(loader: Loader) -> list[str]:
    """Returns the hashes of all samples of a loader, over all processes; see `Batch.keys`."""
    return gathered([key for batch in batches(loader, torch.device("cpu")) for key in batch.keys()])


def check_sets(retain: Loader, forget: Loader) -> tuple[int, int]:
    """Returns the numbers of samples to retain and to forget, over all processes.

    Raises:
        ValueError: one of the sets is empty, or they share a sample.
    """
    retained, forgotten = sample_keys(retain), sample_keys(forget)
    for name, keys in (("retain", retained), ("forget", forgotten)):
        if not keys:
            raise ValueError(f"The {name} set is empty: its loader gives no sample, and at least one is needed.")
    both = set(retained) & set(forgotten)
    if both:
        raise ValueError(
            f"The retain and the forget set overlap: {len(both)} samples are in both. Take what is to be forgotten out "
            "of the retain set (two samples of the same content count as one)."
        )
    return len(retained), len(forgotten)


def unit_uniform(key: str, *purpose: str | int, shape: tuple[int, ...] = ()) -> torch.Tensor:
    """Returns random numbers in [0, 1) that depend on a sample and a purpose alone.

    Whatever the order of the samples and the number of processes, every sample has the same ones.

    Args:
        key: hash of the sample.
        purpose: what the numbers are for.
        shape: how many there are.

    Returns:
        A float64 tensor of that shape.
    """
    seed = int.from_bytes(hashlib.sha256(f"{key} {purpose}".encode()).digest()[:8], "big")
    numbers = uniform(seed, ("unlearning",), torch.Size(shape).numel())
    return ((numbers.double() + 1) / 2).view(shape)
