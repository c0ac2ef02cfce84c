"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from peft_ext.files import write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_links_are_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("mine")
    for name in ("file", "file.partial"):
        (tmp_path / name).symlink_to(tmp_path / "own")
    write_whole(tmp_path / "file", "new")
    assert (tmp_path / "own").read_text() == "mine" and (tmp_path / "file").read_text() == "new"
    assert names(tmp_path) == ["file", "own"] and not (tmp_path / "file").is_symlink()


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_beside_it(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole(tmp_path / "file", "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_text() == "old" and names(tmp_path) == ["file"]
