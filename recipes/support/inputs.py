"""Where the recipes' models, data and metrics come from: the hub, local folders and files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import evaluate
from safetensors import SafetensorError

from recipes.support.arguments import UserError

_METRIC_FOLDER = Path(__file__).parents[1] / "metrics"
# The evaluated subset must be the same for every method and every seed of a run.
SUBSET_SEED = 0


@dataclass
class ModelArguments:
    """Which model is adapted."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or local folder of the model."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Type that the frozen weights are loaded in."}
    )


@dataclass
class DataArguments:
    """What the model is trained and evaluated on."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub id, local folder or one local file."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    train_split: str = field(
        default="train", metadata={"help": "Training split; slices as 'train[:90%%]' are allowed."}
    )
    eval_split: str = field(default="validation", metadata={"help": "Validation split."})


def model_folder(args: ModelArguments) -> str:
    """Returns the hub id or folder, which must be given."""
    if args.model_name_or_path is None:
        raise UserError("no model: give --model_name_or_path, or --preset quickstart, which needs no hub")
    return args.model_name_or_path


def dataset_title(args: DataArguments) -> str:
    """Returns what a card calls the data: the hub id, or the name of a local folder or file without its place."""
    name = str(args.dataset_name)
    return Path(name).stem if Path(name).exists() else name


@contextmanager
def loading(field_name: str, value: str) -> Iterator[None]:
    """Turns what libraries raise for something that is not there into a message for the user."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{field_name}: cannot load {value!r}: {reason}\n"
            "Without a connection to the hub these work: --preset quickstart (makes its own model and data), "
            "--model_name_or_path FOLDER and --dataset_name FOLDER_OR_FILE with local files."
        ) from error


def load_splits(args: DataArguments, columns: list[str]) -> list[datasets.Dataset]:
    """Loads the training and the validation split and checks that they hold some columns."""
    if args.dataset_name is None:
        raise UserError("no data set: give --dataset_name, or --preset quickstart, which needs no hub")
    path = Path(args.dataset_name)
    # `datasets` picks the reader of a single file by its ending when it is given the folder and the file.
    where: dict[str, Any] = (
        {"path": str(path.parent), "data_files": path.name} if path.is_file() else {"path": args.dataset_name}
    )
    names = [args.train_split, args.eval_split]
    with loading("dataset_name", args.dataset_name):
        splits = datasets.load_dataset(name=args.dataset_config_name, split=names, **where)
    for name, split in zip(names, splits):
        if len(split) == 0:
            raise UserError(f"split {name!r} of {args.dataset_name} is empty")
        for column in columns:
            if column not in split.column_names:
                raise UserError(
                    f"column {column!r} is not in split {name!r} of {args.dataset_name}; "
                    f"it has {', '.join(map(repr, split.column_names))}"
                )
    return splits


def check_strings(args: DataArguments, splits: Sequence[datasets.Dataset], columns: Sequence[str]) -> None:
    """Refuses splits, as `load_splits` returns them, with columns that hold anything but text."""
    for name, split in zip((args.train_split, args.eval_split), splits):
        for column in columns:
            if any(not isinstance(value, str) for value in split[column]):
                raise UserError(f"column {column!r} of split {name!r} of {args.dataset_name} holds more than strings")


def random_subset(split: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    """Returns the same rows for every run, at most `limit` if that is given."""
    if limit is None or limit >= len(split):
        return split
    return split.shuffle(seed=SUBSET_SEED).select(range(limit))


def check_counts(args: Any, *names: str) -> None:
    """Refuses fields that are given and less than 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")


def check_distinct(args: Any, *names: str) -> None:
    """Refuses lists in which a value is there twice: its runs would be one."""
    for name in names:
        values = getattr(args, name) or []
        if len(set(values)) < len(values):
            raise UserError(f"{name}: {', '.join(map(str, values))}: one is there twice")


def load_metric(name: str) -> evaluate.Metric:
    """Loads a metric of ``recipes/metrics``, which needs no hub."""
    return evaluate.load(str(_METRIC_FOLDER / name), keep_in_memory=True)
