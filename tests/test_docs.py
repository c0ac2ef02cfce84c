"""Every Python snippet of the documentation runs, and so does every notebook; reference and metadata are complete."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
import yaml

import peft_ext
from peft_ext import generators, unlearning

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", *sorted(f"docs/{each.name}" for each in (ROOT / "docs").glob("*.md"))]


def snippets() -> list[pytest.ParameterSet]:  # type: ignore[name-defined]
    found = []
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        for number, code in enumerate(re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S), 1):
            found.append(pytest.param(code, id=f"{name}-{number}"))
    return found


def test_there_are_snippets():
    assert snippets()


@pytest.mark.parametrize("code", snippets())
def test_a_snippet_runs_and_prints_what_its_comments_say(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "<snippet>", "exec"), {})
    printed = capsys.readouterr().out
    for expected in re.findall(r"# prints: (.*)$", code, flags=re.M):
        assert expected in printed


@pytest.mark.parametrize("notebook", sorted((ROOT / "docs").glob("*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_prints_what_it_shows(notebook, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
            shown = "".join("".join(output["text"]) for output in cell["outputs"])
            assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    ("page", "package"), [("methods", peft_ext), ("unlearning", unlearning), ("generators", generators)]
)
def test_the_reference_has_every_public_name(page, package):
    text = (ROOT / f"docs/api/{page}.md").read_text(encoding="utf-8")
    documented = re.findall(rf"^::: {re.escape(package.__name__)}\.(\w+)$", text, flags=re.M)
    assert sorted(documented) == sorted(name for name in package.__all__ if name != "METHODS")  # a dictionary


def test_tables_of_bytes_hold_what_a_snippet_counts():
    """The one in docs/choosing.md, which holds the snippet, and the shorter one of the README."""

    def rows(name, columns):
        text = (ROOT / name).read_text(encoding="utf-8")
        (table,) = re.findall(rf"^\| method \|{columns}.*\n\| ---.*\n((?:\|.*\n)+)", text, flags=re.M)
        return [re.findall(r"\b\d{1,3}(?:,\d{3})+\b", row) for row in table.splitlines()]

    printed = re.findall(r"^# prints: [^:]+: (.*)$", (ROOT / "docs/choosing.md").read_text(encoding="utf-8"), re.M)
    counted = [line.split() for line in printed]
    assert rows("docs/choosing.md", " trained numbers . bytes") == counted
    assert rows("README.md", " trained numbers . file") == [[*line[:2], *line[3:]] for line in counted]


def test_every_page_is_in_the_navigation():
    def pages(entry):
        if isinstance(entry, str):
            return {entry}
        return set().union(*map(pages, entry.values() if isinstance(entry, dict) else entry))

    settings = yaml.safe_load((ROOT / "docs/mkdocs.yml").read_text(encoding="utf-8"))
    written = {
        path.relative_to(ROOT).as_posix() for place in ("docs", "model_cards") for path in (ROOT / place).rglob("*.md")
    }
    assert written - pages(settings["nav"]) == set()


def test_the_guide_links_every_page():
    guide = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(([^)#]+)", guide))
    written = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert written - linked - {"index.md"} == set()


def test_the_citation_is_of_this_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == peft_ext.__version__


def test_the_long_description_has_no_relative_links():
    convert = runpy.run_path(str(ROOT / "setup.py"))["for_readers_elsewhere"]
    text = """A [page](docs/a.md#b), [one elsewhere](https://example.org), ![a plot](a.png)
```python
print(methods[0](1))
```
[Two
lines](LICENSE)
"""
    code = "```python\nprint(methods[0](1))\n```"
    assert convert(text, "") == f"A page, [one elsewhere](https://example.org), \n{code}\nTwo\nlines\n"
    at = "https://example.org/p/blob/main"
    assert convert(text, "https://example.org/p/") == (
        f"A [page]({at}/docs/a.md#b), [one elsewhere](https://example.org), "
        f"![a plot](https://example.org/p/raw/main/a.png)\n{code}\n[Two\nlines]({at}/LICENSE)\n"
    )
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((?!https)[^)]*\)", convert(readme, "")) == []
