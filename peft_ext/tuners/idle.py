"""How much memory expanded weights may take that the next forward pass does not need."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from typing import Protocol

from ..checks import check_not_negative

_DEFAULT = 1 << 28  # bytes


class Releasable(Protocol):
    """Something that holds expanded weights and can make them again."""

    @property
    def nbytes(self) -> int:
        """What it holds, in bytes."""

    def release(self) -> None:
        """Lets go of them."""


class _Idle:
    def __init__(self) -> None:
        self.budget = _DEFAULT
        self.held: OrderedDict[int, tuple[weakref.ref[Releasable], int]] = OrderedDict()
        self.lock = threading.RLock()  # models may be used in threads of their own


_idle = _Idle()


def set_expansion_budget(nbytes: int) -> int:
    """Sets how many bytes of expanded weights are kept, in this process, beside those of the active adapters.

    Adapters that are switched off keep the weights that were expanded from their coefficients, so that switching back
    costs nothing; the least recently used go first. A batch with several adapters (`adapter_names`) keeps at most as
    much between its passes. The default is 256 MiB. 0 keeps nothing.

    Returns:
        The budget before.

    Raises:
        ValueError: a negative number.
    """
    check_not_negative("nbytes", nbytes)
    with _idle.lock:
        before, _idle.budget = _idle.budget, int(nbytes)
        _shrink()
    return before


def budget() -> int:
    return _idle.budget


def keep(expanded: Releasable) -> None:
    """Notes that expanded weights are not in use, but could be again."""
    if expanded.nbytes:
        with _idle.lock:
            _idle.held[id(expanded)] = weakref.ref(expanded), expanded.nbytes
            _idle.held.move_to_end(id(expanded))
            _shrink()


def use(expanded: Releasable) -> None:
    """Notes that they are in use: they stay, whatever the budget."""
    _idle.held.pop(id(expanded), None)


def _shrink() -> None:
    for key in [key for key, (reference, _) in _idle.held.items() if reference() is None]:
        del _idle.held[key]
    total = sum(size for _, size in _idle.held.values())
    while total > _idle.budget:
        _, (reference, size) = _idle.held.popitem(last=False)
        total -= size
        expanded = reference()
        if expanded is not None:
            expanded.release()
