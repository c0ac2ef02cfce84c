"""Every Python snippet of the documentation runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
