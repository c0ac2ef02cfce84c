"""What benchmarks there are, what each needs, and how it is started."""

from __future__ import annotations

import ast
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from recipes.support.arguments import UserError, hint

_QUALITY = "models and data, given by folder; hours"
_MODULES = {"learning_rates": "quality.learning_rates"}
NEEDS = {
    "learning_rates": _QUALITY,
    "quality": _QUALITY,
    "flat": _QUALITY,
    "step_time": "nothing, or a model",
    "scaling": "nothing",
    "many_adapters": "nothing, or a model",
    "mixed_batch": "nothing, or a model",
    "frozen_prefix": "nothing, or a model",
    "soup": "an image model and images, given by folder; hours",
    "soup_memory": "Linux; nothing, or a model",
    "brainwash": "nothing",
    "quantization": "a recipe's output folder, its model and data",
    "seeded_digits": "nothing",
    "unlearning_curvature": "nothing",
    "unlearning_scale": "nothing, or CIFAR-10",
    "ledger_survival": "os.fork",
    "mutations": "nothing",
    "parity": "nothing",
    "tofu_authors": "TOFU; it makes data",
}
"""The benchmarks by name, and what they need beside this repository."""


def check_name(name: str) -> None:
    """Raises a UserError for a name that no benchmark has."""
    if name not in NEEDS:
        raise UserError(f"there is no benchmark {name!r}; there are {', '.join(NEEDS)}{hint(name, NEEDS)}")


def module_of(name: str) -> str:
    """Returns the module of a benchmark; `python -m` starts it as well."""
    return f"benchmarks.{_MODULES.get(name, name)}"


def summary(name: str) -> str:
    """Returns the first line of what a benchmark says of itself, without importing it."""
    path = Path(__file__).parents[1].joinpath(*module_of(name).split("."))
    path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def run(name: str, argv: Sequence[str]) -> None:
    """Runs a benchmark as `python -m` does.

    Raises:
        UserError: there is none of that name.
    """
    check_name(name)
    sys.argv = [name, *argv]
    runpy.run_module(module_of(name), run_name="__main__", alter_sys=True)
