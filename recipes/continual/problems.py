"""Tasks to learn in turn: the classes of a data set, a few at a time, or pieces of a Swiss roll."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import default_data_collator, set_seed
from transformers.modeling_outputs import SequenceClassifierOutput

from peft_ext import SeededNetwork
from peft_ext.randomness import uniform
from recipes.support.arguments import UserError
from recipes.support.methods import HEAD, Method
from recipes.tasks import image_classification
from recipes.tasks.base import adapt

_WIDTH = 64
_TURNS = (0.75, 2.25)  # where the roll begins and ends


@dataclass
class TaskArguments:
    """What the tasks are."""

    tasks: list[str] = field(
        default_factory=list,
        metadata={
            "help": "The classes of every task, with commas between them, such as 'cat,dog' 'ship,truck'; a name with "
            "a comma in it goes in double quotes. Default: two classes a task, in the order of the data set's."
        },
    )
    swiss_roll: int | None = field(
        default=None,
        metadata={
            "help": "In place of model and data: a Swiss roll in the plane, cut into as many tasks, each of which "
            "tells the two halves of its piece apart, with one output for all, by a network of two hidden layers that "
            "is made from a seed."
        },
    )
    samples: int = field(
        default=200, metadata={"help": "Points of each piece of the Swiss roll, to train and to test."}
    )


@dataclass
class Problem:
    """Tasks, and the model that learns them.

    Attributes:
        names: of the tasks.
        train, test: rows of every task, which say to which it belongs (`task`).
        fresh: returns the model with a fresh adapter, by a seed; it takes `task` beside its own arguments.
        collator: makes a batch of rows.
        left_out: classes of the data that no task has.
        hidden: regular expression of the modules whose outputs are hidden units of a network that is trained whole;
            None for an adapter.
    """

    names: list[str]
    train: list[Dataset]
    test: list[Dataset]
    fresh: Callable[[int], nn.Module]
    collator: Callable[[list[Any]], Mapping[str, Any]] = default_data_collator
    left_out: Sequence[str] = ()
    hidden: str | None = None


class ByTask(nn.Module):
    """A classifier that is told the task of every sample and chooses among its classes.

    The outputs of all other classes are the lowest number there is, so that nothing depends on them.

    Args:
        model: the classifier.
        classes: the numbers of the classes of every task.
        count: how many classes there are.
    """

    accepts_loss_kwargs = False  # for the Trainer, which takes any `**arguments` for a number of items to divide by

    def __init__(self, model: nn.Module, classes: Sequence[Sequence[int]], count: int) -> None:
        super().__init__()
        self.model = model
        others = torch.ones(len(classes), count, dtype=torch.bool)
        for task, own in enumerate(classes):
            others[task, list(own)] = False
        self.register_buffer("others", others, persistent=False)

    def forward(
        self, task: torch.Tensor, labels: torch.Tensor | None = None, **arguments: Any
    ) -> SequenceClassifierOutput:
        logits = self.model(**arguments).logits
        logits = logits.masked_fill(self.others[task], torch.finfo(logits.dtype).min)  # type: ignore[index]
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]


class RowsOfTask(Dataset):
    """Some rows of a data set, with the task that they belong to.

    Args:
        rows: all of them.
        places: those of the task.
        task: its number.
    """

    def __init__(self, rows: Any, places: Sequence[int], task: int) -> None:
        self.rows, self.places, self.task = rows, list(places), task

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[self.places[index]], "task": self.task}


def split_classes(texts: Sequence[str], labels: Sequence[str]) -> list[list[int]]:
    """Returns the numbers of the classes of every task.

    Args:
        texts: names with commas between them, a text for every task, in quotes where a name has a comma; by default
            two classes a task, without the last where their number is odd.
        labels: the names of all classes.

    Raises:
        UserError: an unknown class, one that two tasks share, a task of less than two classes, or a single task.
    """
    if texts:
        rows = [next(csv.reader([text], skipinitialspace=True)) for text in texts]
        tasks = [[name.strip() for name in row if name.strip()] for row in rows]
    else:
        tasks = [list(labels[i : i + 2]) for i in range(0, len(labels) - len(labels) % 2, 2)]
        texts = [", ".join(names) for names in tasks]
    seen: dict[str, str] = {}
    for text, names in zip(texts, tasks):
        for name in names:
            if name not in labels:
                raise UserError(f"tasks: {name!r} is not a class of the data; it has {', '.join(labels)}")
            if name in seen:
                raise UserError(f"tasks: {seen[name]!r} and {text!r} share the class {name!r}; give each its own")
            seen[name] = text
        if len(names) < 2:
            raise UserError(f"tasks: {text!r} has {len(names)} class(es), and at least two must be told apart")
    if len(tasks) < 2:
        raise UserError(f"tasks: there is {len(tasks)}; at least two are learned in turn")
    return [[list(labels).index(name) for name in names] for names in tasks]


def split_images(
    model_args: image_classification.ModelArguments,
    data_args: image_classification.DataArguments,
    args: TaskArguments,
    method: Method,
) -> Problem:
    """Loads an image classifier and the classes of a data set as tasks.

    Args:
        model_args, data_args: which classifier and which data.
        args: the tasks.
        method: the adapter, beside which the head is trained.
    """
    data = image_classification.load_image_data(data_args)
    classes = split_classes(args.tasks, data.labels)
    classifier = image_classification.load_classifier(model_args, data.labels)
    rows = [
        image_classification.ImageRows(data.encoded(split, classifier.processor))
        for split in (data.training_set(data_args.data_seeds[0]), data.validation)
    ]
    image_classification.check_model(classifier, rows[0].pixel_values[:1])

    def fresh(seed: int) -> nn.Module:
        model = adapt(classifier.fresh_model, method, seed, classifier.head)
        return ByTask(model, classes, len(data.labels))

    names = [", ".join(data.labels[number] for number in own) for own in classes]
    found = [
        [
            RowsOfTask(part, [i for i, label in enumerate(part.labels) if label in own], task)
            for task, own in enumerate(classes)
        ]
        for part in rows
    ]
    for name, train, test in zip(names, *found):
        if not len(train) or not len(test):
            raise UserError(
                f"tasks: {name!r} has {len(train)} training and {len(test)} validation images; take more of them, or "
                "other classes"
            )
    options = image_classification.forward_options(classifier.model)
    collator = partial(image_classification.collate, options=options)
    seen = {number for own in classes for number in own}
    left_out = [label for number, label in enumerate(data.labels) if number not in seen]
    return Problem(names, list(found[0]), list(found[1]), fresh, collator, left_out)


class RollNetwork(nn.Module):
    """Two hidden layers between a point in the plane and two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_units = nn.Linear(2, _WIDTH), nn.ReLU()
        self.second, self.second_units = nn.Linear(_WIDTH, _WIDTH), nn.ReLU()
        self.classifier = nn.Linear(_WIDTH, 2)

    def forward(self, points: torch.Tensor) -> SequenceClassifierOutput:
        hidden = self.second_units(self.second(self.first_units(self.first(points))))
        return SequenceClassifierOutput(logits=self.classifier(hidden))  # type: ignore[arg-type]


class RollRows(Dataset):
    """Points of a piece of a Swiss roll, `t (cos 2 pi t, sin 2 pi t)` with a little noise, and in which half they are.

    Args:
        piece: which one, from the middle of the roll.
        pieces: how many there are.
        samples: number of points.
        purpose: draws the points, with the piece.
    """

    def __init__(self, piece: int, pieces: int, samples: int, purpose: str) -> None:
        numbers = uniform(0, ("swiss roll", purpose, piece), 3 * samples).view(3, samples)
        places = (numbers[0] + 1) / 2  # along the piece
        first, last = _TURNS
        t = first + (last - first) * (piece + places) / pieces
        radius = (t + 0.05 * numbers[1]) / last
        self.points = radius[:, None] * torch.stack(((2 * math.pi * t).cos(), (2 * math.pi * t).sin()), 1)
        self.labels = (places >= 0.5).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"points": self.points[index], "labels": int(self.labels[index])}


def swiss_roll(args: TaskArguments, method: Method) -> Problem:
    """Returns the pieces of a Swiss roll as tasks with the same two outputs.

    Args:
        args: how many pieces, of how many points.
        method: makes the network from a seed.
    """
    pieces = int(args.swiss_roll or 0)

    def fresh(seed: int) -> nn.Module:
        set_seed(seed)
        try:
            network = SeededNetwork(RollNetwork(), method.config(None, seed))  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(f"adapter {method.label!r}: {error}") from error
        return ByTask(network, [[0, 1]] * pieces, 2)

    def rows(purpose: str) -> list[Dataset]:
        every = range(args.samples)
        return [RowsOfTask(RollRows(i, pieces, args.samples, purpose), every, i) for i in range(pieces)]

    names = [f"piece {piece + 1}" for piece in range(pieces)]
    return Problem(names, rows("train"), rows("test"), fresh, hidden="_units$")


def check_tasks(args: TaskArguments, method: Method) -> None:
    """Raises a UserError for what shows without data."""
    if args.swiss_roll is None:
        if args.samples != TaskArguments.samples:
            raise UserError("samples is for --swiss_roll; --shots draws a subset of a data set")
        return
    if args.tasks:
        raise UserError("swiss_roll makes its own tasks: leave out --tasks")
    if args.swiss_roll < 2:
        raise UserError(f"swiss_roll is {args.swiss_roll}; at least two tasks are learned in turn")
    if args.samples < 2:
        raise UserError(f"samples is {args.samples}; a piece has two classes and needs at least 2")
    if method.name == HEAD:
        raise UserError("adapter: 'head' is for classifiers of images; give pranc, mcnc or nola")
