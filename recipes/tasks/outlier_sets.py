"""Sets of images that are of none of a task's classes: what the user wrote of them, and their images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from peft_ext.training.outliers import OUTLIER
from recipes.support import inputs
from recipes.support.arguments import UserError, hint, load_yaml
from recipes.tasks import digits
from recipes.tasks.classification import checked_classes, listed
from recipes.tasks.image_classification import DataArguments, ImageData, checked_images

DIGITS = "digits"
"""The name of scikit-learn's handwritten digits."""


@dataclass(frozen=True)
class SetSpec:
    """A set of outliers as the user named it.

    Attributes:
        name: id, folder or file, or `DIGITS`; None for the data set of the known classes.
        split: which split; None for that of training or validation, as its use is.
        labels: the classes to take; none for all that are not known.
        image_column, label_column: None for those of the known classes.
        label: what it is called in tables.
    """

    name: str | None = None
    split: str | None = None
    labels: tuple[str, ...] = ()
    image_column: str | None = None
    label_column: str | None = None
    label: str = ""


def parse_set(flag: str, text: str) -> SetSpec:
    """Reads what the user wrote of a set of outliers; raises a UserError for what is none."""
    value = load_yaml(text, f"{flag}: ")
    options: Any = {"name": value} if isinstance(value, str) else value
    if not isinstance(options, dict) or not options:
        raise UserError(f"{flag}: {text!r} is neither a name nor a mapping such as '{{name: digits, labels: [3, 4]}}'")
    known = [each.name for each in dataclasses.fields(SetSpec)]
    for key, each in options.items():
        if key not in known:
            raise UserError(f"{flag}: unknown option {key!r}{hint(str(key), known)}")
        if key == "labels" and not (isinstance(each, list) and each):
            raise UserError(f"{flag}: labels is {each!r}; it must be a list of classes")
        if key != "labels" and not isinstance(each, str):
            raise UserError(f"{flag}: {key} is {each!r}; it must be text")
    labels = tuple(map(str, options.pop("labels", ())))
    title = " ".join(filter(None, [Path(options.get("name", "")).stem, ", ".join(labels)]))
    return SetSpec(**{"label": title or "other classes", **options}, labels=labels)


@dataclass
class OutlierSet:
    """Images of none of the classes.

    Attributes:
        spec: what was asked for.
        rows: the images, in the columns of the known classes' data, with `OUTLIER` for a class.
        description: what they are, in words.
    """

    spec: SetSpec
    rows: datasets.Dataset
    description: str

    def digests(self, column: str) -> set[tuple[tuple[int, int], bytes]]:
        """Returns what tells images apart."""
        return {(image.size, image.convert("RGB").tobytes()) for image in self.rows[column]}


def load_set(flag: str, spec: SetSpec, split: str, limit: int, data: ImageData) -> OutlierSet:
    """Loads a set of outliers.

    Args:
        flag: what an error message begins with.
        spec: which.
        split: which split, unless the specification says it.
        limit: how many images at most.
        data: the known classes.

    Raises:
        UserError: there are none, the images are of known classes, or they cannot be loaded.
    """
    split, own = spec.split or split, spec.name is None
    pictures, classes = spec.image_column or data.args.image_column, spec.label_column or data.args.label_column
    try:
        if spec.name == DIGITS:
            pictures, classes, halves = "image", "label", digits.splits()
            if split not in halves:
                raise UserError(f"the digits have no split {split!r}; there are {', '.join(halves)}")
            rows = halves[split]
        else:
            source = DataArguments(
                data.args.dataset_name if own else spec.name,
                data.args.dataset_config_name if own else None,
                train_split=split,
                eval_split=split,
            )
            needed = [pictures] + [classes] * bool(own or spec.labels or spec.label_column)
            rows = inputs.load_splits(source, needed)[0]
        taken = "no classes"
        if classes in rows.column_names:
            rows, taken = _of_unknown_classes(rows, split, classes, spec, data.labels)
        rows = checked_images(inputs.random_subset(rows, limit).select_columns([pictures]), split, pictures)
    except UserError as error:
        raise UserError(f"{flag}: {spec.label}: {error}") from error
    rows = rows.rename_column(pictures, data.args.image_column) if pictures != data.args.image_column else rows
    rows = rows.add_column(data.args.label_column, [OUTLIER] * len(rows))  # type: ignore[call-arg]
    return OutlierSet(spec, rows, f"{spec.label} ({len(rows):,} images of {taken}, split {split})")


def _of_unknown_classes(
    rows: datasets.Dataset, split: str, column: str, spec: SetSpec, known: Sequence[str]
) -> tuple[datasets.Dataset, str]:
    """Returns the images of the classes that were asked for, and the names of these classes in words."""
    values, feature = checked_classes(rows, split, column), rows.features[column]
    names = {
        value: feature.int2str(value) if isinstance(feature, datasets.ClassLabel) else str(value)
        for value in set(values)
    }
    for label in spec.labels:
        if label in known:
            raise UserError(f"class {label!r} is among the known classes, {listed(known)}; outliers are of others")
        if label not in names.values():
            raise UserError(f"{label!r} is no class of its split {split!r}, which has {listed(sorted(names.values()))}")
    wanted = {label for label in names.values() if label not in known and (not spec.labels or label in spec.labels)}
    if not wanted:
        raise UserError(
            f"there is no image in it: all classes of its split {split!r}, {listed(sorted(names.values()))}, are "
            "known; --labels names the known classes"
        )
    return rows.select([row for row, value in enumerate(values) if names[value] in wanted]), listed(sorted(wanted))
