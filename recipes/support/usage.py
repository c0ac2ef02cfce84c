"""How long a piece of work takes, and how much memory."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from pathlib import Path
from types import TracebackType

import torch

_STATM = Path("/proc/self/statm")
_INTERVAL = 0.005


class Usage:
    """Measures the block that it is the context of.

    Attributes:
        seconds: wall time.
        processor_seconds: time that the threads of this process were running, which other processes on the machine do
            not lengthen. None where a CUDA device does the work.
        peak_memory: bytes above what was in use before: allocated by torch on a CUDA device, otherwise resident in the
            process, sampled every 5 ms. None where neither is known.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self.processor_seconds: float | None = None
        self.peak_memory: int | None = None
        self._done = threading.Event()
        self._sampler: threading.Thread | None = None

    def __enter__(self) -> Usage:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif _STATM.exists():
            _trim()
            self._before = self._peak = _resident()
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        self._start, self._running = time.perf_counter(), time.process_time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds = time.perf_counter() - self._start
        if self.device.type != "cuda":
            self.processor_seconds = time.process_time() - self._running
        if self.device.type == "cuda":
            self.peak_memory = torch.cuda.max_memory_allocated(self.device) - self._before
        elif self._sampler is not None:
            self._done.set()
            self._sampler.join()
            self.peak_memory = max(self._peak, _resident()) - self._before

    def _sample(self) -> None:
        while not self._done.wait(_INTERVAL):
            self._peak = max(self._peak, _resident())


def _resident() -> int:
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _trim() -> None:
    """Gives freed memory back to the system, or the work before would lend it to the work that is measured."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
