"""Who may change a ledger: one at a time, among holders, processes and groups of processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from .ledger_folder import read_record, regular

LOCK = "ledger.lock"
LOCK_SECONDS = 600.0
"""How long a request waits for those of other processes."""


@contextmanager
def locked(folder: Path, seconds: float | None = None) -> Iterator[None]:
    """Keeps all other holders of a ledger, in this process and in others, from changing it.

    Args:
        folder: of the ledger, which is there.
        seconds: how long to wait for them; by default `LOCK_SECONDS`.

    Raises:
        TimeoutError: another one has held it for so long.
        ValueError: something that is no regular file has the name of the lock's file.
    """
    path, seconds = folder / LOCK, LOCK_SECONDS if seconds is None else seconds
    if os.path.lexists(path):
        regular(path)
    lock = FileLock(path, timeout=seconds)
    try:
        lock.acquire()
    except Timeout as error:
        raise TimeoutError(
            f"Another process has been changing the ledger in {str(folder)!r} for {seconds:g} s (it holds {LOCK}). "
            "Nothing has changed here: try again when it is done."
        ) from error
    try:
        yield
    finally:
        lock.release()


def on_main(action: Callable[[], Any]) -> Any:
    """Returns what an action returns in the main process, or raises what it raises there, in all processes."""
    process = PartialState()
    if process.num_processes == 1:
        return action()
    outcome: list[Any] = [None, None]
    if process.is_main_process:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps all others from changing a ledger; of several processes that serve a request, the main one does."""
    read_record(folder)
    with ExitStack() as stack:
        on_main(lambda: stack.enter_context(locked(folder)))
        yield
