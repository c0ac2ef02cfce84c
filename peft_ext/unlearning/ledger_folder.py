"""The folder of a ledger: its files, who may write them, and what an interruption left of them."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import warnings
from pathlib import Path

from ..files import write_whole
from .ledger_chain import Chain, decoded, encoded

FILE = "ledger.json"
MARK = "peft_ext ledger"
"""What the header of every state says, so that a file of the user with such a name is left alone."""

_STATE = re.compile(r"state-\d{6,}\.safetensors")
_UNFINISHED = re.compile(rf"({_STATE.pattern}|ledger\.json)\.partial")
_HEADER = 200  # bytes in which the mark is


def state_name(chain: Chain) -> str:
    """Returns the name of the file with the tensors that the last entry of a chain is about."""
    return f"state-{len(chain) - 1:06d}.safetensors"


def exists(folder: Path) -> bool:
    """Returns whether something has the name of a ledger's file, be it a broken link."""
    return os.path.lexists(folder / FILE)


def read_record(folder: Path) -> bytes:
    """Returns the bytes of `ledger.json`.

    Raises:
        ValueError: there is none, or it is no regular file.
    """
    path = folder / FILE
    if not os.path.lexists(path):
        left = leftovers(folder, None)
        told = f" {left[0].name!r} is what an interrupted `create` left." if left else ""
        raise ValueError(f"There is no ledger in {str(folder)!r}: {FILE} is missing. `create` makes one.{told}")
    return regular(path).read_bytes()


def read(folder: Path) -> tuple[bytes, Chain, bytes]:
    """Returns the bytes of `ledger.json`, the chain in it, and the bytes of the state that its last entry names.

    A request of another process that is served meanwhile is waited out.

    Raises:
        ValueError: there is no ledger, or it is damaged; the message names the file.
    """
    while True:
        record = read_record(folder)
        try:
            chain = decoded(record)
        except ValueError as error:
            raise ValueError(f"{str(folder / FILE)!r} {error}") from error
        name, expected = state_name(chain), chain[-1]["state"]
        try:
            state = regular(folder / name).read_bytes()
            found = hashlib.sha256(state).hexdigest()
            if found == expected:
                return record, chain, state
            problem: Exception = ValueError(f"its SHA-256 is {found}, and {expected} was written")
        except (OSError, ValueError) as error:
            problem = error
        if read_record(folder) == record:
            raise ValueError(f"The state {name!r} of the ledger in {str(folder)!r} is damaged: {problem}.") from problem


def commit(folder: Path, chain: Chain, state: bytes) -> None:
    """Makes what is on disk this chain and this state: `ledger.json` is replaced last, in one step.

    The caller holds the lock.

    Raises:
        FileExistsError: something that is no state of a ledger has the name of the new state.
        OSError: a file could not be written. The ledger is as it was.
    """
    path = folder / state_name(chain)
    if os.path.lexists(path) and not _is_state(path):
        raise FileExistsError(f"{str(path)!r} is in the way of the ledger's next state: move it, and try again.")
    write_whole(path, state)
    write_whole(folder / FILE, encoded(chain))
    remove_leftovers(folder, chain)


def leftovers(folder: Path, chain: Chain | None) -> list[Path]:
    """Returns the files of former states, which hold hashes of forgotten samples, and files that were not finished.

    Only regular files are among them, with the names and the mark that a ledger gives.

    Args:
        folder: of the ledger.
        chain: of the ledger; None if there is none.
    """
    if not folder.is_dir():
        return []
    current = None if chain is None else state_name(chain)
    return sorted(
        path for path in folder.iterdir() if path.name != current and (_is_state(path) or _is_unfinished(path))
    )


def _is_unfinished(path: Path) -> bool:
    return _UNFINISHED.fullmatch(path.name) is not None and _is_regular(path)


def _is_state(path: Path) -> bool:
    if not _STATE.fullmatch(path.name) or not _is_regular(path):
        return False
    try:
        with path.open("rb") as file:
            return MARK.encode() in file.read(_HEADER)
    except FileNotFoundError:  # another process has deleted it
        return False
    except OSError:  # it cannot be read: the name has to do
        return True


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def remove_leftovers(folder: Path, chain: Chain) -> None:
    """Deletes what `leftovers` names. The caller holds the lock.

    Warns:
        UserWarning: a file could not be deleted.
    """
    for path in leftovers(folder, chain):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            warn_of_leftover(path, error)


def warn_of_leftover(path: Path, error: OSError) -> None:
    """Warns that a file of a former state is still there."""
    warnings.warn(
        f"{str(path)!r} is a former state of a ledger and may hold hashes of forgotten samples; it could not be "
        f"deleted ({error}). Delete it, or open the ledger again once that is allowed. All else is as it should be.",
        stacklevel=2,
    )


def regular(path: Path) -> Path:
    """Returns a path of a regular file.

    Raises:
        ValueError: it is something else: what a link leads to would outlive the ledger's own file.
        OSError: there is nothing.
    """
    if not stat.S_ISREG(path.lstat().st_mode):
        kind = "a symbolic link" if path.is_symlink() else "no file"
        raise ValueError(f"{str(path)!r} must be a regular file, and is {kind}; put the ledger's own file in its place")
    return path
