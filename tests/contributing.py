"""The Python of CONTRIBUTING.md."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def code(heading: str) -> str:
    """The Python of a section."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", section, flags=re.M | re.S))


def defined(heading: str, name: str) -> Any:
    """A class or function of a section, in a module of its own."""
    module = sys.modules[f"contributed_{name}"] = types.ModuleType(f"contributed_{name}")
    exec(compile(code(heading), "CONTRIBUTING.md", "exec"), module.__dict__)
    return getattr(module, name)
