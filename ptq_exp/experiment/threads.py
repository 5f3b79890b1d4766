"""How many CPU threads a run takes: as many as there are cores that nothing else uses while it starts.

Threads of one operation wait for each other: two on a machine with one free core take several times as long as one.
"""

from __future__ import annotations

import logging
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from ptq_exp.experiment.groups import groups_with
from ptq_exp.results.environment import usable_cores
from ptq_exp.settings.schema_machine import TrainerConfig

log = logging.getLogger("ptq_exp")

SHORTEST = 0.25
"""Seconds that the other processes are watched for, at least."""
_SPARE = 0.25  # of a core that others may use without costing a thread
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Watch:
    """What the cores have done up to a moment, in seconds.

    Attributes:
        now: the moment.
        idle: of each core that this process may use; empty where the system does not say.
        own: CPU time of this process.
    """

    now: float
    idle: tuple[float, ...]
    own: float

    @classmethod
    def begin(cls) -> Watch:
        """Look at the cores now."""
        return cls(time.perf_counter(), _idle(), time.process_time())

    def free(self, later: Watch) -> float | None:
        """Return how many cores nothing but this process has used until `later`; None where nobody knows."""
        passed = later.now - self.now
        if not self.idle or len(self.idle) != len(later.idle) or passed <= 0:
            return None
        return (sum(later.idle) - sum(self.idle) + later.own - self.own) / passed


def choose_threads(config: TrainerConfig, device: torch.device, watch: Watch) -> None:
    """Set the threads of torch and of numpy's linear algebra, and log how many they are.

    `trainer.threads` decides; else variables of the environment (OMP_NUM_THREADS), with several devices or a GPU torch
    itself, and else the cores that were free since `watch` began.
    """
    threads = config.threads
    if threads is None:
        if device.type != "cpu" or config.devices > 1 or any(name in os.environ for name in _VARIABLES):
            return
        time.sleep(max(0.0, SHORTEST - (time.perf_counter() - watch.now)))
        cores = min(usable_cores(), _quota())
        free = watch.free(Watch.begin())
        if free is None:
            return
        threads = threads_for(free, cores)
        log.info("CPU threads: %d, as %.1f of %g cores are free; trainer.threads=N sets how many", threads,
                 min(free, cores), cores)
    torch.set_num_threads(threads)
    threadpool_limits(threads, "blas")


def threads_for(free: float, cores: float) -> int:
    """Return how many threads suit so many free cores of so many that may be used: whole ones, and at least one."""
    return max(1, math.floor(min(free + _SPARE, cores)))


def _idle() -> tuple[float, ...]:
    """Return the idle seconds of each core that this process may use, from /proc of Linux."""
    try:
        ticks = os.sysconf("SC_CLK_TCK")
        allowed = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        rows = [row.split() for row in Path("/proc/stat").read_text(encoding="ascii").splitlines()]
        # user nice system idle iowait ...: a core that waits for a disk is free
        return tuple((int(row[4]) + int(row[5])) / ticks for row in rows if row and row[0] in allowed)
    except (OSError, ValueError, IndexError, AttributeError):
        return ()


def _quota() -> float:
    """Return how many cores the control groups of this process allow; infinity where there is no limit."""
    return min((quota_of(version, group) for version, group in groups_with("cpu")), default=math.inf)


def quota_of(version: int, group: Path) -> float:
    """Return how many cores one control group allows; infinity where it has no limit."""
    try:
        if version == 2:
            quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text(encoding="ascii").strip()
                             for name in ("quota", "period"))
        return math.inf if quota in ("max", "-1") else max(1.0, int(quota) / int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
