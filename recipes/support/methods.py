"""Methods as a user names them: names, or YAML mappings of a name, options and a label."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.constants import DUMMY_TARGET_MODULES

import peft_ext  # noqa: F401  (registers its methods with PEFT)
from recipes.support.arguments import UserError, hint, load_yaml

# PEFT's own look-up, by plain name.
_CONFIG_CLASSES = {str(key.value).lower(): config for key, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
_INTERNAL = {f.name for f in dataclasses.fields(PeftConfig)}
_RATE = "learning_rate"
HEAD = "head"
"""The baseline that trains a new head and nothing else: to PEFT, a LoRA without layers."""


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
    verify_adapters: bool = field(
        default=False,
        metadata={
            "help": "Load the first saved adapter of every method in a fresh process and compare its outputs with the "
            "trained one's."
        },
    )
    flat_sigma: float | None = field(
        default=None,
        metadata={
            "help": "Train flat: in every step the merged weights have noise, which grows to this share of a row's "
            "norm (Flat-LoRA; 0.05 in the paper). For methods that add an update to weights. Default: no noise."
        },
    )


@dataclass(frozen=True)
class Spec:
    """A method as the user named it.

    Attributes:
        name: one of the known ones.
        label: what it is called in tables; the name and the scalar options, unless the user gave one.
        options: what else was given.
    """

    name: str
    label: str
    options: dict[str, Any]

    @property
    def folder(self) -> str:
        """The label as a folder name."""
        return folder_name(self.label)


def folder_name(label: str) -> str:
    """Returns a label without what is unusual in a folder name."""
    return re.sub(r"[^A-Za-z0-9=._-]+", "-", label).strip("-.")


def parse_specs(
    texts: Sequence[str],
    known: Mapping[str, Collection[str]],
    flag: str = "methods",
    unlabelled: Collection[str] = (),
    reserved: Collection[str] = (),
) -> list[Spec]:
    """Reads names, or YAML mappings with options.

    Args:
        texts: what the user wrote.
        known: the options of every method, by its name.
        flag: what an error message begins with.
        unlabelled: options that every method has beside its own, and that are no part of a default label.
        reserved: labels that are taken.

    Raises:
        UserError: what is no method, an option that a method lacks, or a label that is there twice.
    """
    specs: list[Spec] = []
    for text in texts:
        value = load_yaml(text, f"{flag}: ")
        options = {"name": value} if isinstance(value, str) else value
        if not isinstance(options, dict) or not isinstance(options.get("name"), str):
            raise UserError(f"{flag}: {text!r} is neither a name nor a mapping with a 'name'")
        options = dict(options)
        name = options.pop("name").lower()
        if name not in known:
            names = sorted(known)
            raise UserError(f"{flag}: unknown method {name!r} (there are {', '.join(names)}){hint(name, names)}")
        label = options.pop("label", None)
        for key, given in options.items():
            if key not in known[name] and key not in unlabelled:
                allowed = ", ".join(sorted(known[name])) or "none"
                raise UserError(f"method {name!r}: unknown option {key!r} (given {given!r}); it has {allowed}")
        if label is None:
            scalars = {key: value for key, value in options.items() if value is None or isinstance(value, (int, float))}
            shown = [f"{key}={value}" for key, value in scalars.items() if key not in unlabelled]
            label = " ".join([name, *shown])
        specs.append(Spec(name, str(label), options))
    taken = [folder_name(label) for label in reserved] + [spec.folder for spec in specs]
    for spec in specs:
        if taken.count(spec.folder) > 1:
            raise UserError(f"{flag}: two are called {spec.label!r}; give each a 'label' of its own")
    return specs


@dataclass(frozen=True)
class Method(Spec):
    """A PEFT method with its options.

    Attributes:
        learning_rate: the method's own, if the user gave one.
    """

    learning_rate: float | None = None

    def refuse_dropout(self) -> None:
        """Raises a UserError for dropout of the method, for recipes that train in evaluation mode."""
        for name, value in self.options.items():
            if name.endswith("dropout") and value:
                raise UserError(
                    f"method {self.label!r}: {name} is {value}, but this recipe trains in evaluation mode, without any "
                    "dropout; leave it out"
                )

    def config(self, task_type: str | None, seed: int, head: Sequence[str] = ()) -> PeftConfig:
        """Returns the PEFT config.

        Args:
            task_type: PEFT's task type.
            seed: the run's seed. It becomes the seed of the method's frozen numbers too, where the method has such a
                field and the user left it open, so that a spread over seeds includes the draw of the basis.
            head: modules to train and save whole beside the adapter, those of the option `modules_to_save` apart.
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


def parse_methods(
    texts: Sequence[str], extra: Sequence[str] = (), flag: str = "methods", reserved: Collection[str] = ()
) -> list[Method]:
    """Reads PEFT methods.

    Args:
        texts: what the user wrote.
        extra: names of methods without options that the recipe has beside those of PEFT, such as `HEAD`.
        flag: what an error message begins with.
        reserved: labels that are taken.
    """
    known: dict[str, set[str]] = {name: set() for name in extra}
    for name, config_class in _CONFIG_CLASSES.items():
        known[name] = {f.name for f in dataclasses.fields(config_class) if f.init} - _INTERNAL
    methods = []
    for spec in parse_specs(texts, known, flag, unlabelled=[_RATE], reserved=reserved):
        options = dict(spec.options)
        rate = options.pop(_RATE, None)
        if rate is not None and not (isinstance(rate, (int, float)) and 0 < rate < math.inf):
            raise UserError(f"method {spec.name!r}: {_RATE} is {rate!r}; it must be a positive number")
        methods.append(Method(spec.name, spec.label, options, rate))
    return methods
