"""Reading data for sums over it: every sample once in all processes together, known by a hash of its content."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import GradientState
from accelerate.utils import gather_object, reduce

_LENGTH_MASK = "attention_mask"


@dataclass
class Batch:
    """Some samples.

    Attributes:
        tensors: what a model is called with that has a row for every sample.
        options: what else it is called with.
    """

    tensors: dict[str, torch.Tensor]
    options: dict[str, Any]

    def __len__(self) -> int:
        return len(self.tensors["labels"])

    def select(self, rows: slice | list[int]) -> Batch:
        return Batch({name: tensor[rows] for name, tensor in self.tensors.items()}, self.options)

    def to(self, device: torch.device) -> Batch:
        return Batch({name: tensor.to(device) for name, tensor in self.tensors.items()}, self.options)

    def chunks(self, size: int) -> Iterator[Batch]:
        for start in range(0, len(self), size):
            yield self.select(slice(start, start + size))

    def keys(self) -> list[str]:
        """A SHA-256 of the content of each sample, without its padding: the same in whatever batch it comes.

        Padding is what `attention_mask` leaves out, in all tensors of its shape.
        """
        tensors = {name: tensor.cpu().contiguous() for name, tensor in sorted(self.tensors.items())}
        mask = tensors.pop(_LENGTH_MASK, None)
        found = []
        for row in range(len(self)):
            digest = hashlib.sha256()
            for name, tensor in tensors.items():
                value = tensor[row]
                if mask is not None and tensor.shape == mask.shape:
                    value = value[mask[row].bool()]
                if value.dtype == torch.bfloat16:
                    value = value.float()
                digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
                digest.update(value.numpy().tobytes())
            found.append(digest.hexdigest())
        return found


Loader = Iterable[Mapping[str, Any] | Batch]


def batches(loader: Loader, device: torch.device) -> Iterator[Batch]:
    """The samples of a loader that this process has to add up.

    Accelerate fills the last batch of a prepared loader up with samples that have been seen; they are left out.

    Args:
        loader: of dicts with `labels` and the other arguments of the model, each either a tensor with a row for every
            sample or something to be passed on as it is; or of what this function gave.

    Raises:
        ValueError: a batch that is no dict, or has no `labels`.
    """
    gradient_state = GradientState()
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
        if gradient_state.in_dataloader and gradient_state.end_of_dataloader and gradient_state.remainder > 0:
            first = PartialState().process_index * size
            batch = batch.select(slice(0, max(0, min(gradient_state.remainder - first, size))))
        if len(batch):
            yield batch.to(device)


@dataclass
class Selection:
    """The samples of a loader whose hashes are among some, or are not.

    Attributes:
        loader: see `batches`.
        keys: the hashes.
        without: whether the others are meant.
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
    """The sum of a tensor over all processes, in each of them."""
    return reduce(tensor, "sum") if PartialState().num_processes > 1 else tensor


def gathered(values: list[Any]) -> list[Any]:
    """The items of all processes, in each of them."""
    return gather_object(values) if PartialState().num_processes > 1 else values


def sample_keys(loader: Loader) -> list[str]:
    """The hashes of all samples of a loader, over all processes; see `Batch.keys`."""
    return gathered([key for batch in batches(loader, torch.device("cpu")) for key in batch.keys()])


def uniform(key: str, *purpose: str | int, shape: tuple[int, ...] = ()) -> torch.Tensor:
    """Random numbers in [0, 1) that depend on a sample and a purpose alone: float64 of a shape.

    Whatever the order of the samples and the number of processes, every sample has the same ones.
    """
    from ... import randomness

    seed = int.from_bytes(hashlib.sha256(f"{key} {purpose}".encode()).digest()[:8], "big")
    numbers = randomness.uniform(seed, ("unlearning",), torch.Size(shape).numel())
    return ((numbers.double() + 1) / 2).view(shape)
