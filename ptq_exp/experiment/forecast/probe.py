"""Measuring what one piece of work takes: seconds, and the most memory above what was in use before."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

BUDGET = 1.0
"""Seconds that one measurement may take; larger pieces of work are derived from smaller ones."""
_REPEATS = 3


@dataclass(frozen=True)
class Line:
    """What `n` samples at once take: seconds, and bytes above what was in use before.

    Attributes:
        fixed, each: seconds of an evaluation whatever its size, and of each sample.
        bytes_each: of each sample; 0 where the system does not say.
    """

    fixed: float
    each: float
    bytes_each: float = 0.0

    def seconds(self, n: float, times: float = 1.0) -> float:
        """Return the seconds of `times` evaluations of `n` samples."""
        return times * (self.fixed + self.each * n)

    def scaled(self, factor: float) -> Line:
        """Return the line of `factor` times the work, in no more memory."""
        return Line(factor * self.fixed, factor * self.each, self.bytes_each)


def line(
    work: Callable[[int], object], n: int, device: torch.device, budget: float = BUDGET, passing: float = 0.0,
    before: Callable[[], object] = lambda: None,
) -> Line:
    """Measure `work(1)` and `work(m)`, m as near to `n` as `budget` seconds allow, and draw a line through both.

    What is used first is slow: neither counts the first call.

    Args:
        passing: bytes that come and go meanwhile, however many samples there are.
        before: called before each measurement.
    """
    _, taken = measured(lambda: work(1), device, before=before)
    one, _ = measured(lambda: work(1), device, before=before)
    m = max(1, min(n, int(budget / max(one, 1e-6))))
    if m == 1:
        return Line(0.0, one, max(taken - passing, 0.0))
    several, taken = measured(lambda: work(m), device, before=before)
    if several < budget:
        several, _ = measured(lambda: work(m), device, repeats=_REPEATS, before=before)
    each = max(several - one, 0.0) / (m - 1)
    fixed = max(several - each * m, 0.0)
    return Line(fixed, (several - fixed) / m, max(taken - passing, 0.0) / m)


def measured(
    work: Callable[[], object], device: torch.device, repeats: int = 1, before: Callable[[], object] = lambda: None
) -> tuple[float, float]:
    """Return the seconds of `work` (the median of `repeats`), and the most bytes above those in use before it.

    Pages of files that it read, and that stay, do not count: the system takes them back where memory is wanted.

    Args:
        before: called before each repeat, and not measured.
    """
    before()
    used, seconds = _begin(device), []
    of_files = _file_bytes(device)
    for number in range(repeats):
        if number:
            before()
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    read = max(0.0, _file_bytes(device) - of_files)
    return sorted(seconds)[len(seconds) // 2], max(0.0, peak_bytes(device) - used - read)


def in_use(device: torch.device) -> float:
    """Return the bytes in use now, of the process or on its GPU; 0 where the system does not say."""
    return float(torch.cuda.memory_allocated(device)) if device.type == "cuda" else _of_process("VmRSS")


def peak_bytes(device: torch.device) -> float:
    """Return the most bytes in use since the last measurement began; 0 where the system does not say."""
    return float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else _of_process("VmHWM")


def _begin(device: torch.device) -> float:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # of the C library of Linux: what was freed is given back
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # 5: forget the peak, see proc(5)
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return in_use(device)


def _file_bytes(device: torch.device) -> float:
    return 0.0 if device.type == "cuda" else _of_process("RssFile") + _of_process("RssShmem")


def _of_process(name: str) -> float:
    try:
        for row in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if row.startswith(f"{name}:"):
                return 1024.0 * int(row.split()[1])
    except (OSError, ValueError):
        pass
    return 0.0
