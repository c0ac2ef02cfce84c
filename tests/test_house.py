"""The house: imports run down only, no two files need each other, and no file is longer than one can keep in mind."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the ground up. A place may import from itself and from the places above it in this list.
LIBRARY = [
    "randomness checks registration files targets presentation",
    "generators checkpoint training",
    "tuners",
    "seeded_network unlearning",
    "from_seed",
    "adapters",
    "__main__ __init__",
]
UNLEARNING = [
    "derivatives ledger_chain",
    "ledger_folder",
    "ledger_fingerprint ledger_lock ledger_state",
    "ledger_trials",
    "ledger methods",
    "evaluation",
]
PROGRAMS = "finetune_gpt2 finetune_vit train_from_seed unlearn learn_in_turn federate reload_adapter"
RECIPES = ["metrics", "support", "tasks", "unlearning continual federation", PROGRAMS, "deployment"]
BESIDE = {("methods", "ledger")}  # the one place that may import from another on its line
NEVER = {("unlearning", "tuners")}  # it works on any adapter


def files(package: str) -> dict[str, Path]:
    """The modules of a package by name."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = {**files("peft_ext"), **files("recipes"), **files("benchmarks")}


def imports(name: str, path: Path) -> set[str]:
    """The modules of the project that a file imports anywhere in it, for types too."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            inside = {f"{module}.{alias.name}" for alias in node.names}
            found |= {full if full in MODULES else module for full in inside}
    return (found & MODULES.keys()) - {name}


GRAPH = {name: imports(name, path) for name, path in MODULES.items()}


def ranks(places: list[str]) -> dict[str, int]:
    return {place: floor for floor, line in enumerate(places) for place in line.split()}


def upward(graph: dict[str, set[str]], prefix: str, places: list[str]) -> list[str]:
    """Imports between the places below a prefix that do not run down."""
    floor, found = ranks(places), []
    depth = prefix.count(".") + 1

    def place(name: str) -> str | None:
        if name != prefix and not name.startswith(f"{prefix}."):
            return None
        parts = name.split(".")
        return parts[depth] if len(parts) > depth else "__init__"

    for name, targets in graph.items():
        here = place(name)
        for target in sorted(targets):
            there = place(target)
            if here is None or there is None or here == there or here == "__init__":
                continue
            assert here in floor and (there in floor or there == "__init__"), f"{name} has no place in the house"
            level = floor.get(there, len(places))
            allowed = level < floor[here] or (here, there) in BESIDE
            if not allowed or (here, there) in NEVER:
                found.append(f"{name} -> {target}")
    return found


@pytest.mark.parametrize(
    ("prefix", "places"), [("peft_ext", LIBRARY), ("peft_ext.unlearning", UNLEARNING), ("recipes", RECIPES)]
)
def test_arrows_run_down(prefix: str, places: list[str]) -> None:
    assert upward(GRAPH, prefix, places) == []


def test_an_arrow_that_runs_up_is_found() -> None:
    for name, target in [
        ("peft_ext.randomness", "peft_ext.generators.base"),
        ("peft_ext.generators.linear", "peft_ext.tuners.config"),
        ("peft_ext.unlearning.ledger", "peft_ext.tuners.config"),
        ("peft_ext.tuners.config", "peft_ext"),
    ]:
        assert upward({**GRAPH, name: {target}}, "peft_ext", LIBRARY) == [f"{name} -> {target}"]
    library = {name: {"recipes.support.inputs"} for name in ("peft_ext.checks",)}
    assert strangers({**GRAPH, **library}) == ["peft_ext.checks -> recipes.support.inputs"]


def strangers(graph: dict[str, set[str]]) -> list[str]:
    """Imports of recipes and benchmarks by those who must not know them."""
    return [
        f"{name} -> {target}"
        for name, targets in graph.items()
        for target in targets
        if (target.startswith("recipes") and name.startswith("peft_ext"))
        or (target.startswith("benchmarks") and not name.startswith("benchmarks"))
    ]


def test_the_library_knows_no_program() -> None:
    assert strangers(GRAPH) == []


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Files that import one another, directly or by way of others."""
    found, done = [], set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append(" -> ".join([*path[path.index(name) :], name]))
        elif name not in done:
            for target in sorted(graph[name]):
                visit(target, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])
    return found


def test_there_is_no_circle_of_files() -> None:
    assert circles(GRAPH) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a -> b -> c -> a"]


def test_files_are_short() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: n for name, n in lengths.items() if name.startswith("peft_ext") and n > 460} == {}
    programs = [f"recipes.{name}" for name in PROGRAMS.split()]
    assert {name: lengths[name] for name in programs if lengths[name] > 150} == {}
