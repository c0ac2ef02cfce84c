"""The command line of the recipes: dataclasses filled from a YAML file or preset and from flags."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import yaml
from transformers import HfArgumentParser, TrainingArguments

CONFIGS = Path(__file__).parents[1] / "configs"
_QUICKSTART = "quickstart"
# Whoever names one of these has a task of their own, and the quickstart's settings are not for it.
_OWN_INPUTS = ("model_name_or_path", "dataset_name", "network_weights")
_TIMESTAMP = "tag:yaml.org,2002:timestamp"
_DESCRIPTION = (
    "The values of the YAML file or preset come first, and flags override them. With neither, the preset quickstart "
    "applies, so that flags alone change the quickstart's settings; where they name a model or data of your own ({own})"
    ", no preset applies."
)
_EPILOG = (
    "Several GPUs: accelerate launch --config_file recipes/configs/accelerate_multi_gpu.yaml -m recipes.{name} ...; "
    "accelerate_cpu_x2.yaml beside it does the same in two processes on the CPU."
)


class UserError(Exception):
    """Something that the user can put right; it is shown without a traceback."""


class _YamlLoader(yaml.SafeLoader):
    """Safe YAML that also reads ``5e-3`` as a number (YAML 1.1 wants ``5.0e-3``) and keeps dates as text."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
# No option is a date; a folder or a label may look like one.
_YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
    for first, resolvers in _YamlLoader.yaml_implicit_resolvers.items()
}


def load_yaml(text: str, where: str = "") -> Any:
    """Parses YAML.

    Args:
        text: what the user wrote.
        where: what an error message begins with.

    Raises:
        UserError: YAML that is malformed or contains itself.
    """
    try:
        value = yaml.load(text, _YamlLoader)  # noqa: S506  (a subclass of SafeLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{where}not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"{where}not valid YAML: it is nested too deeply or contains itself") from error
    if _contains_itself(value, []):
        raise UserError(f"{where}not valid YAML: an anchor refers to itself")
    return value


def _contains_itself(value: Any, above: list[int]) -> bool:
    if id(value) in above:
        return True
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(_contains_itself(part, [*above, id(value)]) for part in parts if isinstance(part, (dict, list)))


class _Parser(HfArgumentParser):
    """An argument parser whose help lists the presets, and then the options of every dataclass under its heading.

    Args:
        types: argument dataclasses, in the order of the help.
        presets: YAML files by name.
        **options: what else `argparse.ArgumentParser` takes.
    """

    def __init__(self, types: Sequence[Any], presets: Mapping[str, Path], **options: Any) -> None:
        super().__init__([], **options)
        group = self.add_argument_group("Presets")
        group.add_argument("--preset", choices=list(presets), help="A YAML file that comes with the recipe.")
        self.dataclass_types = types
        for each in types:
            self._add_dataclass_arguments(each)

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        group = self.add_argument_group(_heading(dtype))
        # transformers adds to a group only if the dataclass names it, and TrainingArguments does not.
        self.add_argument = group.add_argument  # type: ignore[method-assign]
        try:
            super()._add_dataclass_arguments(dtype)
        finally:
            del self.add_argument

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def _heading(dtype: Any) -> str:
    if issubclass(dtype, TrainingArguments):
        return "Training (transformers.TrainingArguments)"
    return (dtype.__doc__ or dtype.__name__).strip().splitlines()[0].rstrip(".")


def parse_arguments(recipe: str, types: Sequence[Any], argv: Sequence[str]) -> tuple[Any, ...]:
    """Reads ``[config.yaml] [--preset NAME] [--flag value ...]`` into dataclasses.

    The values of the file are turned into flags and put before the user's own, so that both are converted and checked
    by one parser and the user's win. With neither a file nor ``--preset`` the preset ``quickstart`` applies, unless the
    flags name a model or data of the user's own: ``--model_name_or_path``, ``--dataset_name`` or ``--network_weights``.

    Args:
        recipe: name of the recipe's module; its presets are ``configs/<recipe>_<preset>.yaml``.
        types: argument dataclasses, `TrainingArguments` last.
        argv: the command line without the program.

    Returns:
        One instance of each type.

    Raises:
        UserError: what the user can put right. What argparse itself finds ends the program with exit status 2.
    """
    presets = {path.stem.removeprefix(f"{recipe}_"): path for path in sorted(CONFIGS.glob(f"{recipe}_*.yaml"))}
    known = {f.name for each in types for f in dataclasses.fields(each) if f.init}
    own = [name for name in _OWN_INPUTS if name in known]
    parser = _Parser(
        types,
        presets,
        prog=f"python -m recipes.{recipe}",
        usage="%(prog)s [config.yaml] [--preset NAME] [--FLAG VALUE ...]",
        description=_DESCRIPTION.format(own=", ".join(f"--{name}" for name in own)),
        epilog=_EPILOG.format(name=recipe),
        allow_abbrev=False,
    )
    flags = list(argv)
    path = Path(flags.pop(0)) if flags and not flags[0].startswith("-") else None
    given, _ = parser.parse_known_args(flags)
    if given.preset is not None:
        if path is not None:
            raise UserError(f"give either a YAML file ({path}) or --preset ({given.preset}), not both")
        path = presets[given.preset]
    elif path is None and all(getattr(given, name) is None for name in own):
        path = presets.get(_QUICKSTART)
    if path is not None:
        own_flags = {flag.partition("=")[0] for flag in flags}
        flags = _flags_of_file(path, known) + flags
        if "--num_train_epochs" in own_flags and "--max_steps" not in own_flags:
            flags.append("--max_steps=-1")  # a file's would win over the user's epochs
    if not getattr(torch, "accelerator", torch.cuda).is_available():
        # Without being told so, Accelerate takes the processes of a launch on CPUs for single ones.
        flags.insert(0, "--use_cpu=true")
    try:
        *parsed, _, unknown = parser.parse_args_into_dataclasses(
            flags, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    if unknown:
        raise UserError(f"unknown argument {unknown[0]!r}{hint(unknown[0].lstrip('-'), known)}")
    return tuple(parsed)


def _flags_of_file(path: Path, known: set[str]) -> list[str]:
    if not path.exists():
        raise UserError(f"there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    values = load_yaml(text, f"{path}: ")
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold 'key: value' lines")
    flags: list[str] = []
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}{hint(str(key), known)}")
        try:
            if isinstance(value, list) and value:
                flags += [f"--{key}", *map(_as_text, value)]
            elif value is not None and value != []:
                flags.append(f"--{key}={_as_text(value)}")
        except TypeError as error:
            raise UserError(
                f"{path}: {key} must be text, a number, true or false, or a list of them: {error}"
            ) from error
    return flags


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def hint(name: str, known: Iterable[str]) -> str:
    """Returns what a message about an unknown name ends with."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else "; --help lists what there is"


def run_main(main: Callable[[Sequence[str]], None]) -> None:
    """Runs a recipe from the command line: what the user can put right is a line on stderr and exit status 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if dist.is_available() and dist.is_initialized():
        # A process that exits with the group's threads still running is now and then aborted by them.
        dist.destroy_process_group()
