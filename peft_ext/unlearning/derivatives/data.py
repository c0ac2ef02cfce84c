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
from ...targets import IGNORED

_LENGTH_MASK, _DECODER_MASK = "attention_mask", "decoder_attention_mask"
_WIDE = ("inputs_embeds", "decoder_inputs_embeds", "bbox")  # tensors with several numbers a token


@dataclass
class Batch:
    """The arguments of one call of a model, which can be cut into samples.

    Attributes:
        tensors: arguments with a row for every sample, `(n, ...)` each, `labels` among them.
        options: the other arguments, the same for all samples.
    """

    tensors: dict[str, torch.Tensor]
    options: dict[str, Any]

    def __len__(self) -> int:
        return len(self.tensors["labels"])

    def select(self, rows: slice | list[int]) -> Batch:
        return Batch({name: tensor[rows] for name, tensor in self.tensors.items()}, self.options)

    def to(self, device: torch.device) -> Batch:
        return Batch({name: tensor.to(device) for name, tensor in self.tensors.items()}, self.options)

    def keys(self) -> list[str]:
        """Returns a SHA-256 of each sample's content without its padding: the same in whatever batch it comes.

        Padding is what `attention_mask` leaves out, left and right, in all tensors of its shape. The tensors of a
        decoder, with `labels` among them, have `decoder_attention_mask` for it, or end with the last label. So do
        labels of another text than the one that is read, from which an encoder-decoder derives its decoder's inputs.
        """
        tensors = {name: tensor.cpu().contiguous() for name, tensor in sorted(self.tensors.items())}
        masks = {_LENGTH_MASK: tensors.pop(_LENGTH_MASK, None)}
        decoder = {name for name in tensors if name.startswith("decoder_")}
        if decoder:
            decoder.add("labels")
            mask = tensors.pop(_DECODER_MASK, None)
            masks[_DECODER_MASK] = _up_to_the_last(tensors["labels"]) if mask is None else mask
        found = []
        for row in range(len(self)):
            digest = hashlib.sha256()
            for name, tensor in tensors.items():
                value = tensor[row]
                mask = masks[_DECODER_MASK if name in decoder else _LENGTH_MASK]
                if name == "labels" and not decoder and _is_other_text(tensors, mask, row):
                    value = _other_text(tensor, tensors.get("input_ids"), mask, row)
                elif mask is not None and tensor.shape[: mask.dim()] == mask.shape and _has_tokens(name, tensor):
                    value = value[mask[row].bool()]
                if value.dtype == torch.bfloat16:
                    value = value.float()
                digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
                digest.update(value.numpy().tobytes())
            found.append(digest.hexdigest())
        return found


def _is_other_text(tensors: dict[str, torch.Tensor], mask: torch.Tensor | None, row: int) -> bool:
    """Returns whether the labels of a sample are not those of what it reads, as far as that shows without the model."""
    labels, ids = tensors["labels"], tensors.get("input_ids")
    if labels.dim() != 2 or "inputs_embeds" in tensors:
        return False
    if ids is None or labels.shape != ids.shape:
        return True
    outside = torch.zeros_like(ids[row], dtype=torch.bool) if mask is None else mask[row] == 0
    return bool(((labels[row] != IGNORED) & (labels[row] != ids[row]) & outside).any())


def _other_text(labels: torch.Tensor, ids: torch.Tensor | None, mask: torch.Tensor | None, row: int) -> torch.Tensor:
    """Returns the labels of a sample up to the last target, and at least as many as it has tokens to read.

    Where both texts have as many places, whose labels they are does not show for every sample: those that are taken
    for the labels of what is read are as many as its tokens.
    """
    tokens = 0 if ids is None else ids.shape[1] if mask is None else int(mask[row].sum())
    places = (labels[row] != IGNORED).nonzero()
    length = max(tokens, int(places[-1]) + 1 if len(places) else 0)
    return torch.nn.functional.pad(labels[row, :length], (0, max(0, length - labels.shape[1])), value=IGNORED)


def _up_to_the_last(labels: torch.Tensor) -> torch.Tensor | None:
    """Returns a mask of the places up to the last target of every sample, `(n, length)`; None for a target a sample."""
    return None if labels.dim() == 1 else (labels != IGNORED).flip(-1).cumsum(-1).flip(-1) > 0


def _has_tokens(name: str, tensor: torch.Tensor) -> bool:
    """Returns whether the second dimension of a tensor is one of tokens, if it is as long as theirs."""
    return tensor.dim() == 2 or name in _WIDE


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
