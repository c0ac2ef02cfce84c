"""Files that are there whole or not at all, and folders that may be written into."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def check_writable(out: str | os.PathLike[str], overwrite: bool, source: Path | None = None) -> Path:
    """Verifies that a checkpoint can be written into a folder without a loss.

    Args:
        overwrite: into a folder that is not empty.
        source: the folder that it is made from.

    Raises:
        FileExistsError: `out` is `source`, a file, or not empty.
    """
    path = Path(out)
    if source is not None and path.exists() and path.resolve() == source.resolve():
        raise FileExistsError("`out` must be another folder than the checkpoint's, got the same.")
    if path.exists() and (not path.is_dir() or any(path.iterdir())) and not (overwrite and path.is_dir()):
        raise FileExistsError(f"`out` must be a new or empty folder, or be overwritten, got {str(out)!r}.")
    return path


def write_whole(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Writes a file so that whoever finds it, also after a crash of the machine, finds all of it.

    The data goes to a new file beside it, which then takes its place; a link at either place is replaced, not followed.
    Files that are written one after the other appear in this order. Where writing fails, nothing is left beside it.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        with partial.open("xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes the names in a folder last, where the system has a way to ask for it."""
    with contextlib.suppress(OSError):  # Windows and some network drives have none; the file is written all the same
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
