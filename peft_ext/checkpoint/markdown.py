"""Text from outside in a Markdown document: it stays text, whatever is in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

_HARMLESS = re.compile(r"[A-Za-z0-9.,:;/@+=(){}'\"\[\]_-]+( [A-Za-z0-9.,:;/@+=(){}'\"\[\]_-]+)*")


def escape(text: object) -> str:
    """Text for prose or a table cell: everything that Markdown or HTML could read becomes a character reference."""
    return "".join(c if c.isascii() and c.isalnum() or c in " .,/-" else f"&#{ord(c)};" for c in str(text))


def code(text: object) -> str:
    """Text as code within a line or a table cell."""
    return f"`{text}`" if _HARMLESS.fullmatch(str(text)) else f"<code>{escape(text)}</code>"


def python_string(text: str) -> str:
    """A Python literal for a text in a code block, with nothing in it that ends the block or looks like a comment."""
    return "".join(
        c if c.isprintable() and c not in "<>`" else rf"\x{ord(c):02x}" if ord(c) < 256 else rf"\U{ord(c):08x}"
        for c in json.dumps(text, ensure_ascii=False)
    )


def table(rows: Iterable[Iterable[str]]) -> str:
    """The rows of a table, whose cells are Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
