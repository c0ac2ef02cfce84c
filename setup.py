"""Everything is in setup.cfg but the long description: README.md with links for readers who do not have the files."""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent


def for_readers_elsewhere(text: str, url: str) -> str:
    """Text in Markdown whose relative links lead to the project's files at an address.

    Args:
        url: of the repository, such as that of `git clone`. Without one, links become their text and pictures go.
    """

    def replaced(link: re.Match[str]) -> str:
        picture, words, path = link.groups()
        if url:
            return f"{picture}[{words}]({url.rstrip('/')}/{'raw' if picture else 'blob'}/main/{path})"
        return "" if picture else words

    parts = re.split(r"^(```.*?^```$)", text, flags=re.M | re.S)  # code is every second part
    parts[::2] = [re.sub(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)]+)\)", replaced, part) for part in parts[::2]]
    return "".join(parts)


if __name__ == "__main__":
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    setup(long_description=for_readers_elsewhere(readme, settings.get("metadata", "url", fallback="")))
