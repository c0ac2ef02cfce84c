"""Rows of the parity table: what a row is, how its cells come about, and what rows share.

A row is a function that takes a method and checks one thing that a LoRA user does against a value that was found in
another way: a model with the updates added to its weights, the base model, the tensors of a file. It returns nothing if
the outcome is that value, or a sentence that says how the method differs on purpose. An error that was raised on
purpose, with a message, is a refusal; any other error, and a failed assertion, is wrong.
"""

from __future__ import annotations

import copy
import importlib
import io
import linecache
import re
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_ext import McncConfig, NolaConfig, PrancConfig

WORKS, DIFFERS, REFUSED, NOT_RUN, WRONG = "works", "differs", "refused", "not run", "wrong"


class Refused(Exception):
    """The library has refused what the row asks for."""


class NotRun(Exception):
    """The row cannot be run here."""


@dataclass(frozen=True)
class Method:
    """A column of the table: a configuration class and the fields of a small adapter."""

    name: str
    config_class: type[PeftConfig]
    fields: dict[str, Any]

    def config(self, **options: Any) -> Any:
        """A configuration with random coefficients unless `zero=True`, for the modules q_proj and v_proj by default.

        Raises:
            Refused: the configuration class does not know one of the options.
        """
        initial = {self.random_field: True if options.pop("zero", False) else False}
        try:
            return self.config_class(**{"target_modules": ["q_proj", "v_proj"], **initial, **self.fields, **options})
        except TypeError as error:
            if "unexpected keyword argument" in str(error):
                raise Refused(f"TypeError: {error}") from error
            raise

    @property
    def random_field(self) -> str:
        return "init_lora_weights" if self.is_lora else "init_weights"

    @property
    def is_lora(self) -> bool:
        return self.config_class is LoraConfig

    def adapt(self, base: nn.Module, **options: Any) -> Any:
        """A copy of a model with a random adapter, in evaluation mode."""
        return get_peft_model(copy.deepcopy(base), self.config(**options)).eval()


METHODS = {
    method.name: method
    for method in (
        Method("LoRA", LoraConfig, {"r": 2, "lora_alpha": 2}),
        Method("NOLA", NolaConfig, {"r": 2, "num_basis": (5, 7), "alpha": 2.0}),
        Method("PRANC", PrancConfig, {"num_coefficients": 13}),
        Method("MCNC", McncConfig, {"r": 2, "k": 3, "d": 13, "widths": (5,), "alpha": 10.0}),
    )
}


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        slow: it takes more than a second or two, and the test leaves it to the script.
    """

    group: str
    title: str
    check: Callable[[Method], str | None] = field(repr=False)
    slow: bool = False


@dataclass(frozen=True)
class Outcome:
    """A cell: one of the five words, what to say in a footnote, and the time that it took."""

    status: str
    note: str = ""
    seconds: float = 0.0


ROWS: dict[str, Row] = {}


def row(group: str, title: str, slow: bool = False) -> Callable[[Callable[[Method], str | None]], Any]:
    """Makes a function a row of the table."""

    def add(check: Callable[[Method], str | None]) -> Callable[[Method], str | None]:
        assert title not in ROWS, title
        ROWS[title] = Row(group, title, check, slow)
        return check

    return add


def run(each: Row, method: Method) -> Outcome:
    """The cell of a row and a method."""
    torch.manual_seed(0)
    start = time.perf_counter()
    status, note = WORKS, ""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            said = each.check(method)
            if said:
                status, note = DIFFERS, said
        except NotRun as error:
            status, note = NOT_RUN, str(error)
        except Refused as error:
            status, note = REFUSED, first_words(str(error))
        except Exception as error:
            on_purpose = raised_on_purpose(error)
            status, note = (REFUSED if on_purpose else WRONG), first_words(f"{type(error).__name__}: {error}")
    return Outcome(status, note, time.perf_counter() - start)


def raised_on_purpose(error: Exception) -> bool:
    """Whether a library has raised an error to refuse what was asked, rather than run into it."""
    if not isinstance(error, (ValueError, TypeError, NotImplementedError, RuntimeError)):
        return False
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    packages = Path(frame.filename).parts
    libraries = {"peft", "peft_ext", "transformers", "diffusers", "trl", "sentence_transformers", "setfit"}
    return line.startswith("raise") and bool(libraries & set(packages)) and "benchmarks" not in packages


def first_words(message: str, most: int = 190) -> str:
    """A message in one line, cut between words, without what differs between runs."""
    line = re.sub(r"(/tmp|/var)/[^\s'\"]*", "...", " ".join(message.split()))
    line = re.sub(r" at 0x[0-9a-f]+", "", line)
    return line if len(line) <= most else line[:most].rsplit(" ", 1)[0] + " ..."


# What rows share


def need(name: str) -> Any:
    """A module of a library that may be missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotRun(f"{name.partition('.')[0]} cannot be imported here: {first_words(str(error), 80)}") from error


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Fails unless two tensors are equal up to a part of the largest entry."""
    found, expected = found.detach().float(), expected.detach().float()
    assert found.shape == expected.shape, f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    largest = float(expected.abs().max())
    error = float((found - expected).abs().max())
    assert error <= tolerance * max(largest, 1e-6), f"off by {error:.2g}, the largest value is {largest:.2g}"


def different(found: torch.Tensor, other: torch.Tensor) -> None:
    """Fails if two tensors are as good as equal: an effect is there."""
    error = float((found.detach().float() - other.detach().float()).abs().max())
    assert error > 1e-3, "no effect"


def adapted_layers(model: nn.Module, adapter: str = "default") -> dict[str, Any]:
    """The layers of a model that an adapter adapts, by the names that they have in the base model."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and adapter in module._get_available_adapters()
    }


def dense(base: nn.Module, model: nn.Module, **weights: float) -> Any:
    """A copy of the base model with the updates of adapters of an adapted model, each times a number, in its weights.

    Args:
        weights: the number for every adapter; 1 for "default" if none is given.
    """
    combined: Any = copy.deepcopy(base).eval()
    for adapter, times in (weights or {"default": 1.0}).items():
        layers = adapted_layers(model, adapter)
        assert layers, f"{adapter!r} adapts nothing"
        for name, layer in layers.items():
            weight = combined.get_submodule(name).weight
            weight.data += times * layer.get_delta_weight(adapter).detach().to(weight)
    return combined
