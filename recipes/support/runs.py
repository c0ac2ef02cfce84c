"""The course of a recipe's run, from its arguments to its report, and the folder that it leaves behind."""

from __future__ import annotations

import dataclasses
import gc
import json
import tempfile
import typing
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments

from peft_ext.files import write_whole
from recipes.support import inputs
from recipes.support.arguments import UserError, parse_arguments

_RECORD = "arguments.json"
_STATE = "trainer_state.json"
_MARKS = ("*/result.json", f"*/checkpoint-*/{_STATE}")
_REPORTS = tuple(
    "results.json results.md report.json report.md accuracy.png bytes.png loss.png losses.png matrix.png "
    "tradeoff.png".split()
)
# Where a run is written and how it reports may change between an interruption and its continuation.
_FREE_ON_RESUME = {"output_dir", "resume_from_checkpoint", "overwrite_output_dir", "disable_tqdm", "use_cpu"}


class Result(Protocol):
    """What a run gives."""

    def save(self, folder: Path) -> None:
        """Writes the result into a folder, whole or not at all."""

    @classmethod
    def load(cls, folder: Path) -> Any:
        """Returns what `save` wrote; raises a FileNotFoundError where nothing is."""


R = TypeVar("R", bound=Result)


@dataclass
class RunArguments:
    """How often everything is done, and whether it may replace what is there."""

    seeds: list[int] = field(
        default_factory=list, metadata={"help": "Do everything once with each of these seeds. Default: --seed alone."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Write into --output_dir even if it holds files."}
    )


class Recipe(ABC, Generic[R]):
    """A program: what it does at every station of a run. `run_recipe` goes from one to the next.

    A subclass is a dataclass. Its fields with an argument dataclass are what `--help` lists, in the same order; fields
    with `init=False` are what one station leaves to the next.

    Attributes:
        name: name of the program's module, and beginning of the names of its presets.
        result: class of the results.
        marks: patterns of the files by which a resumed run knows what is done. They are deleted when a run is
            overwritten.
    """

    name: ClassVar[str]
    result: ClassVar[Any]
    marks: ClassVar[Sequence[str]] = _MARKS
    run: RunArguments
    training: TrainingArguments

    @property
    def seeds(self) -> list[int]:
        """The seeds of the runs."""
        return self.run.seeds or [self.training.seed]

    def check(self) -> None:
        """Raises a UserError for whatever shows without model and data."""
        return None

    def make(self, folder: Path) -> None:
        """Makes a quickstart's model and data below the output folder, with all processes."""
        return None

    def continued(self, name: str, before: Any, now: Any) -> Any:
        """Returns what an argument is in a run that is continued with another value of it; None if it cannot be.

        Args:
            name: of the argument.
            before, now: its values.
        """
        return None

    @abstractmethod
    def load(self) -> None:
        """Loads model and data. The main process goes first, so that the others find its caches."""

    def try_out(self) -> None:
        """Raises a UserError for what does not fit together, before hours of training."""
        return None

    @abstractmethod
    def runs(self) -> Mapping[str, Callable[[Path], R]]:
        """Returns what is to be done, by the names of the folders that it is done in."""

    @abstractmethod
    def report(self, results: list[R], folder: Path) -> list[str]:
        """Writes the report in the main process and returns the names of its files."""


def argument_types(recipe: type[Recipe[Any]]) -> list[Any]:
    """Returns the argument dataclasses of a recipe."""
    hints = typing.get_type_hints(recipe)
    return [hints[f.name] for f in dataclasses.fields(recipe) if f.init]  # type: ignore[arg-type]


T = TypeVar("T", bound=Recipe[Any])


def open_recipe(recipe_class: type[T], argv: Sequence[str]) -> T:
    """Returns a recipe whose arguments have been read and checked.

    Args:
        recipe_class: the recipe.
        argv: the command line without the program.
    """
    recipe = recipe_class(*parse_arguments(recipe_class.name, argument_types(recipe_class), argv))
    inputs.check_distinct(recipe.run, "seeds")
    _check_training(recipe.run, recipe.training)
    recipe.check()
    _set_up(recipe.training)
    return recipe


def run_recipe(recipe_class: type[Recipe[Any]], argv: Sequence[str]) -> None:
    """Runs a recipe: reads and checks its arguments, prepares, claims the output folder, does all runs, reports.

    Nothing is left in the output folder before all input is known to be good, apart from a quickstart's own model and
    data.

    Args:
        recipe_class: the recipe.
        argv: the command line without the program.
    """
    recipe = open_recipe(recipe_class, argv)
    arguments = [getattr(recipe, f.name) for f in dataclasses.fields(recipe) if f.init]  # type: ignore[arg-type]
    training, folder = recipe.training, Path(str(recipe.training.output_dir))
    state = PartialState()
    record = check_output_dir(training, arguments, recipe.run.overwrite_output_dir, recipe.continued)
    state.wait_for_everyone()  # no process may write before all have looked
    recipe.make(folder)
    with state.main_process_first():
        recipe.load()
    recipe.try_out()
    if state.is_main_process:
        claim_output_dir(training, record, recipe.marks)
    state.wait_for_everyone()
    results = run_all(training, recipe.runs(), recipe.result)
    if state.is_main_process:
        *names, last = recipe.report(results, folder)
        print(f"{', '.join(names)} and {last} are in {folder}", flush=True)


def _check_training(run: RunArguments, training: TrainingArguments) -> None:
    """Raises a UserError for arguments of the Trainer that would have no effect, or another one than is meant."""
    if run.seeds and training.seed != TrainingArguments.seed:
        raise UserError(
            f"seed is {training.seed}, but --seeds ({', '.join(map(str, run.seeds))}) says with which seeds everything "
            f"is done; give --seeds {training.seed}"
        )
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(training, name):
            raise UserError(
                f"{name}: the Trainer would cast the model for good before it is saved; --{name[:4]} evaluates under "
                "autocast"
            )


def _set_up(training: TrainingArguments) -> None:
    training.dataloader_pin_memory &= training.device.type != "cpu"
    training.label_names = ["labels"]  # hidden from the Trainer by PEFT's wrapper
    training.restore_callback_states_from_checkpoint = True  # that of the clock of the training steps


def check_output_dir(
    training: TrainingArguments,
    arguments: Sequence[Any],
    overwrite: bool,
    continued: Callable[[str, Any, Any], Any] = lambda name, before, now: None,
) -> dict[str, Any]:
    """Refuses a folder that cannot be written, and one that holds files, unless it is overwritten or continued.

    Args:
        training: the Trainer's arguments.
        arguments: all argument dataclasses. A run is continued with the same ones.
        overwrite: whether files may be overwritten.
        continued: see `Recipe.continued`.

    Returns:
        What `claim_output_dir` writes down once all other input is checked too.
    """
    folder = Path(str(training.output_dir))
    try:
        files = any(folder.iterdir()) if folder.is_dir() else False
        above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not above.is_dir():
            raise UserError(f"output_dir: {above} is a file; name a folder")
        PartialState().wait_for_everyone()  # no process may find the file of another one here
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise UserError(f"output_dir: cannot write into {folder}: {error.strerror}; name another folder") from error
    resume = training.resume_from_checkpoint
    if resume is not None and resume.lower() != "true":
        raise UserError(
            f"resume_from_checkpoint: {resume!r}; the recipe finds the last checkpoint of every method in --output_dir "
            "by itself, so the only value is true"
        )
    if files and resume is None and not overwrite:
        raise UserError(
            f"output_dir: {folder} is not empty; name another, or give --overwrite_output_dir, or continue the "
            "interrupted run in it with --resume_from_checkpoint true"
        )
    record = {}
    for each in arguments:
        values = each.to_dict() if isinstance(each, TrainingArguments) else dataclasses.asdict(each)
        record.update({key: value for key, value in values.items() if key not in _FREE_ON_RESUME})
    record = json.loads(json.dumps(record, default=str))
    record["num_processes"] = PartialState().num_processes  # on which depends what a batch is
    path = folder / _RECORD
    if resume is not None and path.is_file():
        with reading(path):
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        for key in sorted(record.keys() | before.keys()):
            if record.get(key) == before.get(key):
                continue
            value = continued(key, before.get(key), record.get(key))
            if value is None:
                raise UserError(
                    f"resume_from_checkpoint: the run in {folder} was started with {key} = {before.get(key)!r}, "
                    f"now it is {record.get(key)!r}"
                )
            record[key] = value
    return record


def claim_output_dir(training: TrainingArguments, record: dict[str, Any], marks: Sequence[str] = _MARKS) -> None:
    """Writes down the arguments of the run that begins, or goes on, in the folder; for the main process.

    Args:
        training: the Trainer's arguments.
        record: what `check_output_dir` returned.
        marks: patterns of the files without which nothing of an overwritten run is taken for finished or continued.
            Its report goes too.
    """
    folder = Path(str(training.output_dir))
    try:
        if training.resume_from_checkpoint is None:
            for stale in [path for pattern in (*marks, *_REPORTS) for path in folder.glob(pattern)]:
                stale.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / _RECORD, json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"output_dir: cannot write into {folder}: {error.strerror}; name another folder") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what reading a damaged file of an earlier run raises into a message for the user."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (
        OSError, ValueError, TypeError, KeyError, AttributeError, EOFError, zipfile.BadZipFile, SafetensorError
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"resume_from_checkpoint: {path} is damaged ({reason}); delete it to have that part done again, or start "
            "anew with --overwrite_output_dir"
        ) from error


def run_all(training: TrainingArguments, runs: Mapping[str, Callable[[Path], R]], result: type[R]) -> list[R]:
    """Does some runs, each in a folder of its name; a resumed recipe takes the results of the finished ones.

    Args:
        training: the Trainer's arguments.
        runs: what is done, by the name of its folder below the output folder.
        result: class of what they return.
    """
    state = PartialState()
    results = []
    # The Trainer collects garbage whenever it starts; going through all that was loaded would be part of every time.
    gc.collect()
    gc.freeze()
    try:
        for name, run in runs.items():
            folder = Path(str(training.output_dir)) / name
            if training.resume_from_checkpoint:
                try:
                    with reading(folder):
                        results.append(result.load(folder))
                    continue
                except FileNotFoundError:
                    pass
            found = run(folder)
            if state.is_main_process:
                found.save(folder)
            state.wait_for_everyone()
            results.append(found)
    finally:
        gc.unfreeze()
    return results


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the newest whole checkpoint of a run; None if there is none.

    Newer ones that are damaged are passed over with a line that says so, and renamed: the Trainer counts checkpoints,
    and would delete those that it writes from now on in their favour.
    """
    state = PartialState()
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    flaws: dict[Path, str] = {}
    whole = None
    for checkpoint in checkpoints:
        flaw = _flaw(checkpoint)
        if flaw is None:
            whole = checkpoint
            break
        flaws[checkpoint] = flaw
    state.wait_for_everyone()  # no process may rename before all have looked
    if state.is_main_process:
        for checkpoint, flaw in flaws.items():
            there = f"the run goes on from {whole.name}" if whole else "the run starts from the beginning"
            print(f"Skipped the damaged checkpoint {checkpoint} ({flaw}): {there}", flush=True)
            checkpoint.rename(_free(checkpoint.with_name(f"damaged-{checkpoint.name}")))
    state.wait_for_everyone()
    return whole


def _free(path: Path) -> Path:
    names = (path if number == 0 else path.with_name(f"{path.name}-{number}") for number in range(10_000))
    return next(name for name in names if not name.exists())


def _flaw(checkpoint: Path) -> str | None:
    """Returns what is wrong with a checkpoint, as far as that shows without loading it."""
    if not (checkpoint / _STATE).is_file():
        return f"it has no {_STATE}, which is written last"
    found = sorted(checkpoint.iterdir())
    # A folder holds the shards of FSDP or DeepSpeed.
    if not any(path.is_dir() or "model" in path.name and path.suffix in (".safetensors", ".bin") for path in found):
        return "it has no weights"
    for file in found:
        try:
            if file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
            elif file.suffix in (".pt", ".pth") and not zipfile.is_zipfile(file):  # what torch.save writes
                return f"{file.name} is cut off"
        except (OSError, ValueError, SafetensorError) as error:
            return f"{file.name}: {' '.join(str(error).split())}"
    return None
