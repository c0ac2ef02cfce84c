"""The rooms of the recipes: imports run down only, and programs are short."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FLOORS = ["support", "tasks", "unlearning", "programs"]
FILES = sorted(RECIPES.glob("*.py")) + [path for floor in FLOORS[:-1] for path in sorted(RECIPES.glob(f"{floor}/*.py"))]


def imported(path: Path) -> set[str]:
    """The modules of the recipes that a file imports; a name of a room counts as its module."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("recipes.")}


def floor(parts: list[str]) -> int:
    return FLOORS.index(parts[0]) if parts[0] in FLOORS else len(FLOORS) - 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(RECIPES)))
def test_imports_run_down_only(path: Path) -> None:
    here = floor(list(path.relative_to(RECIPES).parts))
    for name in imported(path):
        there = floor(name.split(".")[1:])
        assert there <= here, f"{path} imports {name}"
        assert there < len(FLOORS) - 1, f"{path} imports {name}: a program is no library"


def test_programs_are_short() -> None:
    for path in RECIPES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 150, path
