"""Wall times of several ways to compute the same, taken in turns, so that other load on a machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

WARM_UP = 1
"""Calls that are not counted: the first one of a network compiles, or fills caches."""


@dataclass(frozen=True)
class Times:
    """Wall times of one way, in ms, one for each turn."""

    ms: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median over turns."""
        return statistics.median(self.ms)


def interleaved(
    ways: Mapping[str, Callable[[], object]], repeats: int, *, budget: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Time every one of `ways` once per turn, after a call of each that is not counted.

    Every other turn goes through them backwards, so that none always follows the one that leaves the processor slower
    or its caches full of something else.

    Args:
        repeats: turns.
        budget: seconds after which no further turn begins; the first one is always whole. None = no limit.

    Returns:
        The times by the names of `ways`.
    """
    for _ in range(WARM_UP):
        for call in ways.values():
            call()
    taken: dict[str, list[float]] = {name: [] for name in ways}
    started = clock()
    for turn in range(repeats):
        if turn and budget is not None and clock() - started > budget:
            break
        for name, call in list(ways.items())[:: -1 if turn % 2 else 1]:
            before = clock()
            call()
            taken[name].append(1000 * (clock() - before))
    return {name: Times(tuple(found)) for name, found in taken.items()}


def ratio(times: Mapping[str, Times], slow: str, fast: str) -> float | None:
    """Compute how much faster `fast` is than `slow`, the median over turns; None if one was not timed."""
    if slow not in times or fast not in times:
        return None
    return statistics.median(a / b for a, b in zip(times[slow].ms, times[fast].ms, strict=True))
