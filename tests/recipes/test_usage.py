"""Seconds and memory."""

from __future__ import annotations

import time

import torch

from recipes.support.usage import Usage


def test_memory_of_a_block_is_measured() -> None:
    before = torch.ones(30_000_000)  # not counted
    with Usage(torch.device("cpu")) as usage:
        taken = torch.ones(10_000_000)
        time.sleep(0.1)  # for several samples
        del taken
    del before
    assert usage.seconds >= 0.1
    assert usage.peak_memory is None or 35e6 < usage.peak_memory < 100e6
