"""What the recipes share: arguments from YAML files and flags, methods by name, output folders."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.constants import DUMMY_TARGET_MODULES
from transformers import HfArgumentParser, TrainingArguments

import peft_ext  # noqa: F401  (registers its methods with PEFT)

# PEFT's own look-up, by plain name.
_CONFIG_CLASSES = {str(key.value).lower(): config for key, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
# The baseline that trains a new head and nothing else: to PEFT, a LoRA without layers.
HEAD = "head"
CONFIGS = Path(__file__).parents[1] / "configs"

_RECORD = "arguments.json"
# Where a run is written and how it reports may change between an interruption and its continuation.
_FREE_ON_RESUME = {"output_dir", "resume_from_checkpoint", "overwrite_output_dir", "disable_tqdm", "use_cpu"}


class UserError(Exception):
    """Something the user can put right; shown without a traceback."""


@dataclass
class MethodArguments:
    """Which adapters are trained, one after the other, on the same data."""

    methods: list[str] = field(
        default_factory=lambda: ["nola"],
        metadata={
            "help": "Any PEFT method: its name, or a YAML mapping of its name and options, such as "
            "'{name: lora, r: 1, learning_rate: 2e-4, label: LoRA r=1}'. The options are the fields of its PEFT "
            "config; a learning rate of its own goes before --learning_rate. For image classifiers also 'head', which "
            "trains the head alone; the other methods train it beside the adapter."
        },
    )
    seeds: list[int] = field(
        default_factory=list,
        metadata={"help": "Train every method once with each of these seeds. Default: --seed alone."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Write into --output_dir even if it holds files."}
    )
    verify_adapters: bool = field(
        default=False,
        metadata={
            "help": "Load the first saved adapter of every method in a fresh process and compare its outputs with the "
            "trained one's."
        },
    )


@dataclass(frozen=True)
class Method:
    """A PEFT method with its options, as the user named it."""

    name: str
    label: str
    learning_rate: float | None
    options: dict[str, Any]

    @property
    def folder(self) -> str:
        """The label as a folder name."""
        return re.sub(r"[^A-Za-z0-9=._-]+", "-", self.label).strip("-.")

    def config(self, task_type: str | None, seed: int, head: Sequence[str] = ()) -> PeftConfig:
        """The PEFT config.

        Args:
            task_type: PEFT's task type.
            head: Modules to train and save whole beside the adapter, those of the option `modules_to_save` apart.
            seed: The run's seed. It becomes the seed of the method's frozen numbers too, where the method has such a
                field and the user left it open, so that a spread over seeds includes the draw of the basis.
        """
        options = {"task_type": task_type, **self.options}
        if self.name == HEAD:
            config_class: type[PeftConfig] = LoraConfig
            options["target_modules"] = DUMMY_TARGET_MODULES
        else:
            config_class = _CONFIG_CLASSES[self.name]
        fields = {f.name for f in dataclasses.fields(config_class)}
        if "seed" in fields:
            options.setdefault("seed", seed)
        if head and "modules_to_save" not in fields:
            raise UserError(f"method {self.label!r}: {self.name} cannot train {', '.join(head)} beside the adapter")
        if head:
            options["modules_to_save"] = sorted({*head, *(options.get("modules_to_save") or [])})
        try:
            config = config_class(**options)
        except (TypeError, ValueError) as error:
            raise UserError(f"method {self.label!r}: {error}") from error
        if task_type is None and config.is_prompt_learning:
            raise UserError(f"method {self.label!r}: {self.name} is for text")
        return config


class _YamlLoader(yaml.SafeLoader):
    """Safe YAML that also reads ``5e-3`` as a number; YAML 1.1 wants ``5.0e-3``."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_yaml(text: str) -> Any:
    """Parse YAML; a syntax error is the user's."""
    try:
        return yaml.load(text, _YamlLoader)  # noqa: S506  (a subclass of SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"not valid YAML: {error}") from error


def parse_methods(specs: Sequence[str], extra: Sequence[str] = ()) -> list[Method]:
    """Read ``--methods``: names, or YAML mappings with options.

    Args:
        specs: What the user wrote.
        extra: Names of methods without options that the recipe has beside those of PEFT, such as `HEAD`.
    """
    known = sorted([*_CONFIG_CLASSES, *extra])
    methods = []
    for spec in specs:
        value = load_yaml(spec)
        options = {"name": value} if isinstance(value, str) else value
        if not isinstance(options, dict) or not isinstance(options.get("name"), str):
            raise UserError(f"methods: {spec!r} is neither a name nor a mapping with a 'name'")
        options = dict(options)
        name = options.pop("name").lower()
        if name not in known:
            raise UserError(f"methods: unknown method {name!r}; there are {', '.join(known)}")
        learning_rate = options.pop("learning_rate", None)
        if learning_rate is not None and (not isinstance(learning_rate, (int, float)) or learning_rate <= 0):
            raise UserError(f"method {name!r}: learning_rate is {learning_rate!r}; it must be a positive number")
        scalars = [
            f"{key}={value}" for key, value in options.items() if isinstance(value, (int, float)) and key != "label"
        ]
        label = str(options.pop("label", " ".join([name, *scalars])))
        internal = {f.name for f in dataclasses.fields(PeftConfig)}
        fields = () if name in extra else dataclasses.fields(_CONFIG_CLASSES[name])
        allowed = sorted({f.name for f in fields if f.init} - internal)
        for key, value in options.items():
            if key not in allowed:
                raise UserError(
                    f"method {name!r}: unknown option {key!r} (given {value!r}); it has {', '.join(allowed) or 'none'}"
                )
        methods.append(Method(name, label, learning_rate, options))
    folders = [method.folder for method in methods]
    for method in methods:
        if folders.count(method.folder) > 1:
            raise UserError(f"methods: two are called {method.label!r}; give each a 'label' of its own")
    return methods


def parse_arguments(recipe: str, types: Sequence[Any], argv: Sequence[str]) -> tuple[Any, ...]:
    """Read ``[config.yaml] [--preset NAME] [--flag value ...]`` into dataclasses.

    The values of the file are turned into flags and put before the user's own, so that both are converted and checked
    by one parser and the user's win.

    Args:
        recipe: Name of the recipe's module; its presets are ``configs/<recipe>_<preset>.yaml``.
        types: Argument dataclasses.
        argv: The command line without the program.

    Returns:
        One instance of each type.
    """
    presets = {path.stem.removeprefix(f"{recipe}_"): path for path in sorted(CONFIGS.glob(f"{recipe}_*.yaml"))}
    parser = HfArgumentParser(
        types,
        prog=f"python -m recipes.{recipe}",
        usage="%(prog)s [config.yaml] [--preset NAME] [--FLAG VALUE ...]",
        description="Values come from the YAML file or preset; flags override them. Without any argument: "
        "--preset quickstart.",
        allow_abbrev=False,
    )
    parser.add_argument("--preset", choices=list(presets), help="A YAML file that comes with the recipe.")
    known = {f.name for each in types for f in dataclasses.fields(each) if f.init}

    flags = list(argv) or ["--preset", "quickstart"]
    path = Path(flags.pop(0)) if not flags[0].startswith("-") else None
    preset = parser.parse_known_args(flags)[0].preset
    if preset is not None:
        if path is not None:
            raise UserError(f"give either a YAML file ({path}) or --preset ({preset}), not both")
        path = presets[preset]
    if path is not None:
        flags = _flags_of_file(path, known) + flags
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
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    values = load_yaml(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold 'key: value' lines")
    flags: list[str] = []
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}{hint(str(key), known)}")
        if isinstance(value, list) and value:
            flags += [f"--{key}", *map(_as_text, value)]
        elif value is not None and value != []:
            flags.append(f"--{key}={_as_text(value)}")
    return flags


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def hint(name: str, known: Iterable[str]) -> str:
    """What a message about an unknown name ends with."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else "; --help lists what there is"


def check_output_dir(training: TrainingArguments, arguments: Sequence[Any], overwrite: bool) -> dict[str, Any]:
    """Refuse a folder that holds files, unless it is to be overwritten or continued with the same arguments.

    Args:
        training: The Trainer's arguments.
        arguments: All argument dataclasses.
        overwrite: Whether files may be overwritten.

    Returns:
        What `claim_output_dir` writes down once all other input is checked too.
    """
    folder = Path(str(training.output_dir))
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir: {folder} is a file")
    resume = training.resume_from_checkpoint
    if resume is not None and resume.lower() != "true":
        raise UserError(
            f"resume_from_checkpoint: {resume!r}; the recipe finds the last checkpoint of every method in --output_dir "
            "by itself, so the only value is true"
        )
    if folder.is_dir() and any(folder.iterdir()) and resume is None and not overwrite:
        raise UserError(
            f"output_dir: {folder} is not empty; name another, or give --overwrite_output_dir, or continue the "
            "interrupted run in it with --resume_from_checkpoint true"
        )
    record = {}
    for each in arguments:
        values = each.to_dict() if isinstance(each, TrainingArguments) else dataclasses.asdict(each)
        record.update({key: value for key, value in values.items() if key not in _FREE_ON_RESUME})
    record = json.loads(json.dumps(record, default=str))
    path = folder / _RECORD
    if resume is not None and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        for key in sorted(record.keys() | before.keys()):
            if record.get(key) != before.get(key):
                raise UserError(
                    f"resume_from_checkpoint: the run in {folder} was started with {key} = {before.get(key)!r}, "
                    f"now it is {record.get(key)!r}"
                )
    return record


def claim_output_dir(training: TrainingArguments, record: dict[str, Any]) -> None:
    """Write down the arguments of the run that begins, or goes on, in the folder; for the main process."""
    folder = Path(str(training.output_dir))
    if training.resume_from_checkpoint is None:
        # Marks of a run that is overwritten: without them nothing of it is taken for finished or continued.
        for stale in [*folder.glob("*/result.json"), *folder.glob("*/checkpoint-*/trainer_state.json")]:
            stale.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def run_main(main: Callable[[Sequence[str]], None]) -> None:
    """Run a recipe from the command line: what the user can put right is a line on stderr and exit status 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
