"""`Forecast`: what a run will take, before anything long runs: seconds of each stage, memory, disk."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ptq_exp.experiment.forecast.probe import peak_bytes
from ptq_exp.experiment.forecast.room import Need

log = logging.getLogger("ptq_exp")


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Attributes:
        seconds: stage -> seconds; None where nobody knows.
        reused: stages whose result is in the cache; they take no time.
        needs: stage -> memory beyond what was in use, of the GPU where there is one.
        before: bytes in use when it was made.
        disk: file or folder -> bytes that are written there.
        device: whose memory it is.
        took: seconds that making it took.
    """

    seconds: Mapping[str, float | None]
    reused: tuple[str, ...] = ()
    needs: Mapping[str, Need] = field(default_factory=dict)
    before: float = 0.0
    disk: Mapping[str, float] = field(default_factory=dict)
    device: str = "cpu"
    took: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of all stages that are known."""
        return sum(seconds or 0.0 for seconds in self.seconds.values())

    @property
    def memory(self) -> float:
        """Most bytes in use at any time."""
        return self.before + max((need.bytes for need in self.needs.values()), default=0.0)

    def table(self) -> str:
        """Return it as lines to read."""
        rows = [(stage, _time(seconds, stage in self.reused)) for stage, seconds in self.seconds.items()]
        rows += [("all stages", _time(self.total)), ("", "")]
        rows += [(f"memory ({self.device})", size(self.memory))]
        rows += [(f"disk: {what}", size(count)) for what, count in self.disk.items()]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}}  {text}".rstrip() for name, text in rows)

    def to_dict(self) -> dict[str, Any]:
        """Return its entries of results.json."""
        return {
            "seconds": {stage: None if s is None else round(s, 3) for stage, s in self.seconds.items()},
            "total_seconds": round(self.total, 3), "reused": list(self.reused), "memory_bytes": int(self.memory),
            "disk_bytes": {what: int(count) for what, count in self.disk.items()}, "took": round(self.took, 2),
        }

    def beside(self, taken: Mapping[str, float]) -> dict[str, Any]:
        """Log what the stages have taken beside it; returns the entries of results.json about that."""
        known = {stage: (s, taken[stage]) for stage, s in self.seconds.items() if s is not None and stage in taken}
        forecast, actual = (sum(pair[i] for pair in known.values()) for i in (0, 1))
        longest = sorted(known, key=lambda stage: -known[stage][1])[:6]
        shown = ", ".join(f"{stage} {known[stage][0]:.1f}/{known[stage][1]:.1f}" for stage in longest)
        peak = peak_bytes(torch.device(self.device))
        memory = f"{size(self.memory)}/{size(peak)}"
        log.info("forecast/taken: %.1f/%.1f s (%s); memory %s", forecast, actual, shown, memory)
        return {"taken": {
            "seconds": round(actual, 2), "ratio": round(forecast / actual, 3) if actual else None,
            "memory_bytes": int(peak),
        }}


def size(count: float) -> str:
    """Return bytes in the unit that suits them."""
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= one:
            return f"{count / one:.2f} {unit}"
    return f"{count:.0f} B"


def _time(seconds: float | None, reused: bool = False) -> str:
    if reused:
        return "reused from the cache"
    if seconds is None:
        return "not known"
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
