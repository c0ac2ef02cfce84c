"""Which images to label first, when none are: those nearest to the centres of clusters, or random ones.

Pourahmadi, Nooralinejad, Pirsiavash, "A Simple Baseline for Low-Budget Active Learning", arXiv 2110.12033: k-means with
as many clusters as images can be labelled, on normalised features of a model that has seen no labels, and of every
cluster the member nearest to its centre.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, send_to_device
from rich.console import Console
from rich.progress import track
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from recipes.support import inputs
from recipes.support.arguments import UserError
from recipes.tasks.image_classification import Classifier, ImageData, collate, forward_options

_RESTARTS, _ITERATIONS = 5, 20  # of the paper's code


@dataclass
class SelectionArguments:
    """Which training images are labelled, in place of --shots."""

    budget: int | None = field(
        default=None,
        metadata={
            "help": "Train on as many images, chosen from the pool without their classes once for each of --data_seeds."
        },
    )
    selection: Literal["kmeans", "random"] = field(
        default="kmeans",
        metadata={
            "help": "How --budget chooses: 'kmeans', the image nearest to the centre of each cluster of the base "
            "model's features; or 'random'."
        },
    )
    pool_size: int | None = field(
        default=None,
        metadata={"help": "--budget chooses from a random subset of the training split of this size. Default: all."},
    )


def check_arguments(args: SelectionArguments, shots: int | None) -> None:
    """Raises a UserError for what shows without the data."""
    inputs.check_counts(args, "budget", "pool_size")
    if args.budget is None:
        for name in ("selection", "pool_size"):
            if getattr(args, name) != getattr(SelectionArguments(), name):
                raise UserError(f"{name} says how --budget chooses, and there is no --budget")
    elif shots is not None:
        raise UserError("shots and budget: one says how many images of every class, the other how many in all")


def select(
    args: SelectionArguments, data: ImageData, classifier: Classifier, training: TrainingArguments
) -> dict[int, ImageData]:
    """Returns data whose training images are those that `--budget` allows, all of them without it, by data seed.

    All processes do this together.

    Args:
        args: how many, and how they are chosen.
        data: holds the pool.
        classifier: makes the features, which are what its head reads.
        training: says in which batches, and where.

    Raises:
        UserError: the budget is larger than the pool.
    """
    seeds = data.args.data_seeds
    if args.budget is None:
        return dict.fromkeys(seeds, data)
    pool = inputs.random_subset(data.train, args.pool_size)
    if args.budget > len(pool):
        raise UserError(f"budget is {args.budget}, but there are {len(pool)} images to choose from")
    if args.selection == "random":
        chosen = [np.random.default_rng(seed).permutation(len(pool))[: args.budget].tolist() for seed in seeds]
    else:
        points = features(replace(data, train=pool), classifier, training)
        # Clusters may differ with the last bits of the features, and those between machines.
        chosen = broadcast_object_list([nearest_members(points, args.budget, seed) for seed in seeds])
    return {seed: replace(data, train=pool.select(places)) for seed, places in zip(seeds, chosen)}


def nearest_members(points: np.ndarray, clusters: int, seed: int) -> list[int]:
    """Returns the places of the points nearest to the centres of their clusters.

    There are fewer than `clusters` if fewer points differ.

    Args:
        points: `(n, dimensions)`.
        clusters: how many there are.
        seed: draws the first centres.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different points than clusters
        found = KMeans(clusters, n_init=_RESTARTS, max_iter=_ITERATIONS, random_state=seed).fit(points)
    distances = ((points - found.cluster_centers_[found.labels_]) ** 2).sum(1)
    order = np.argsort(distances, kind="stable")
    _, first = np.unique(found.labels_[order], return_index=True)
    return sorted(order[first].tolist())


@torch.no_grad()
def features(data: ImageData, classifier: Classifier, training: TrainingArguments) -> np.ndarray:
    """Returns what a classifier's head reads of the training images, each of length 1, `(images, dimensions)`."""
    model, place = classifier.model.eval(), classifier.model.device
    read: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        read.append(args[0].flatten(1).float().cpu())

    hooks = [model.get_submodule(name).register_forward_pre_hook(keep) for name in classifier.head]
    rows = data.encoded(data.train, classifier.processor)
    collator = partial(collate, options=forward_options(model))
    loader = DataLoader(rows, training.per_device_eval_batch_size, collate_fn=collator)  # type: ignore[arg-type]
    found = []
    model.to(training.device)  # type: ignore[arg-type]
    try:
        for batch in track(loader, "Features of the pool", console=Console(stderr=True)):
            model(**send_to_device(batch, training.device))
            found.append(read[-1])  # of several new modules the last one is the head proper
            read.clear()
    finally:
        model.to(place)  # type: ignore[arg-type]
        for hook in hooks:
            hook.remove()
    return torch.nn.functional.normalize(torch.cat(found)).numpy()


def described(args: SelectionArguments, data: ImageData, chosen: dict[int, ImageData]) -> str:
    """Returns what was chosen, in words: how many images of how many, and how many classes they are of.

    Args:
        args: how they were chosen.
        data: holds the classes, and the pool.
        chosen: what `select` returned, by data seed.
    """
    pool = min(len(data.train), args.pool_size or len(data.train))
    column = data.args.label_column
    parts = [
        f"data seed {seed}: {len(each.train)} images of {len(set(each.train[column]))} classes"
        for seed, each in chosen.items()
    ]
    return f"{args.budget} images chosen by {args.selection} from {pool:,}, without their classes ({'; '.join(parts)})"
