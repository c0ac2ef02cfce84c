"""What a loader reads, as rows and a collator: what a training takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, Subset

from ...targets import IGNORED
from ...training.batch import Batch
from ..derivatives.data import Loader, batches

Collator = Callable[[list[Any]], Mapping[str, Any]]


def some_of(rows: Any, count: int, rng: np.random.Generator) -> Any:
    """Returns `count` random rows of a map-style set in the set's order, the set itself if it has no more."""
    if count >= len(rows):
        return rows
    return Subset(rows, sorted(rng.choice(len(rows), count, replace=False).tolist()))


def share_of(rows: Any, share: float, rng: np.random.Generator) -> Any:
    """Returns a random share of a map-style set's rows, at least one, in the set's order; all of them for 1."""
    return rows if share == 1 else some_of(rows, max(1, round(share * len(rows))), rng)


def rows_of(*loaders: Loader) -> tuple[list[Any], Collator]:
    """Returns the rows of some loaders, a map-style set for each, and what makes batches of all of them.

    The data set and the collator of a `DataLoader` that reads every row once a pass are taken as they are. What other
    loaders give is read once and cut into samples.

    Args:
        loaders: what `batches` takes.

    Raises:
        ValueError: the loaders have to be read, and there are several processes, of which each would read its share.
    """
    first = loaders[0]
    if isinstance(first, DataLoader) and all(
        isinstance(loader, DataLoader) and _reads_all(loader) and loader.collate_fn == first.collate_fn
        for loader in loaders
    ):
        return [loader.dataset for loader in loaders], first.collate_fn  # type: ignore[attr-defined]
    if PartialState().num_processes > 1:
        raise ValueError(
            "In several processes a method that trains needs loaders of one collator that read a map-style data set "
            "once a pass: make a `Request` of the data sets and call `unlearn`."
        )
    return [_samples(loader) for loader in loaders], collate


def _reads_all(loader: DataLoader) -> bool:
    sampler = loader.batch_sampler
    # Accelerate's, of which each process has one, contain the loader's own.
    sampler = getattr(sampler, "batch_sampler", sampler)
    if type(sampler) is not BatchSampler or sampler.drop_last:
        return False
    order = sampler.sampler
    if type(order) is SequentialSampler:
        return order.data_source is loader.dataset
    return (
        isinstance(order, RandomSampler)
        and order.data_source is loader.dataset
        and not order.replacement
        and order.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    )


def _samples(loader: Loader) -> list[dict[str, Any]]:
    return [
        {**{name: tensor[place] for name, tensor in batch.tensors.items()}, **batch.options}
        for batch in batches(loader, torch.device("cpu"))
        for place in range(len(batch))
    ]


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Makes a batch of samples that come from batches, padded to the longest by zeros and labels of -100.

    Raises:
        ValueError: the lengths differ, and there is no attention mask to tell padding apart.
    """
    batch: dict[str, Any] = {}
    for name, value in rows[0].items():
        if not isinstance(value, (torch.Tensor, list)):
            batch[name] = torch.tensor([row[name] for row in rows]) if name == "labels" else value
            continue
        tensors = [torch.as_tensor(row[name]) for row in rows]
        if len({tensor.shape for tensor in tensors}) > 1:
            if "attention_mask" not in rows[0]:
                raise ValueError(
                    f"The samples' {name!r} have different lengths, and there is no 'attention_mask' that tells "
                    "padding apart: give `DataLoader`s, whose collator makes the batches."
                )
            filling = IGNORED if name == "labels" else 0
            padded = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=filling)
            batch[name] = padded
        else:
            batch[name] = torch.stack(tensors)
    return batch


def batch_size_of(loader: Loader) -> int:
    """Returns the size of a loader's first batch."""
    first: Batch | None = next(batches(loader, torch.device("cpu")), None)
    return 1 if first is None else len(first)
