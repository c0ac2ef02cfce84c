"""Times of two pieces of work in turn, so that a machine which slows down for a while slows both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from recipes.support.arguments import UserError

FEWEST = 7
"""Pairs below which quartiles say nothing."""


def check_pairs(name: str, pairs: int) -> None:
    """Raises a UserError for fewer pairs than `FEWEST`."""
    if pairs < FEWEST:
        raise UserError(f"{name}: quartiles need at least {FEWEST} pairs, got {pairs}")


def seconds(work: Callable[[], Any]) -> tuple[float, float]:
    """Returns the wall time of some work, and the time that the threads of this process were running."""
    _synchronize()
    start, running = time.perf_counter(), time.process_time()
    work()
    _synchronize()
    return time.perf_counter() - start, time.process_time() - running


def compare(what: str, baseline: Callable[[], Any], candidate: Callable[[], Any], pairs: int) -> dict[str, Any]:
    """Times a candidate and its baseline in turn, after a pair that warms up; which comes first alternates.

    Returns:
        By names that begin with `what`: the candidate's median wall time (`_seconds`), the median ratio of the pairs
        (`_ratio`) and the first and third quartile (`_ratio_quartiles`); and the same ratios of processor time, which
        other processes of the machine disturb less (`_processor_ratio`, `_processor_ratio_quartiles`).
    """
    works, found = (baseline, candidate), []
    for pair in range(pairs + 1):
        times = {which: seconds(works[which]) for which in ((0, 1) if pair % 2 else (1, 0))}
        found.append((times[0], times[1]))
    row: dict[str, Any] = {f"{what}_seconds": statistics.median(after[0] for _, after in found[1:])}
    for clock, name in enumerate(("ratio", "processor_ratio")):
        ratios = [after[clock] / before[clock] for before, after in found[1:]]
        low, median, high = (float(value) for value in np.percentile(ratios, (25, 50, 75)))
        row |= {f"{what}_{name}": median, f"{what}_{name}_quartiles": [low, high]}
    return row


def ratio_cell(row: dict[str, Any], what: str) -> str:
    """Returns a median ratio with its quartiles as text."""
    low, high = row[f"{what}_quartiles"]
    return f"{row[what]:.3f} ({low:.3f} to {high:.3f})"


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
