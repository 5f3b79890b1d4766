"""Memory that this process may still take: what the system has, and what its control groups leave of it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from ptq_exp.experiment.groups import groups_with

_UNLIMITED = 1 << 60  # version 1 says "no limit" by a number as large as no memory is
_NAMES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
    2: ("memory.max", "memory.current", ("active_file", "inactive_file")),
}
"""Of each version: files with the limit and with what is in use, and the rows of memory.stat that count files."""


def available_memory() -> float | None:
    """Return the bytes that this process may still take; None where the system does not say."""
    found = [left for version, group in groups_with("memory") if (left := left_by(version, group)) is not None]
    with suppress(OSError, ValueError):
        for row in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if row.startswith("MemAvailable:"):
                found.append(1024.0 * int(row.split()[1]))
    return min(found, default=None)


def left_by(version: int, group: Path) -> float | None:
    """Return the limit of a control group less what it holds, in bytes; None where it has no limit.

    Pages of files do not count as held, where the system says how many they are: they make room for others.
    """
    limit, usage, files = _NAMES[version]
    of_files = 0
    try:
        most = int((group / limit).read_text(encoding="ascii"))  # "max" is no number
        held = int((group / usage).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    with suppress(OSError, ValueError):
        rows = [row.split() for row in (group / "memory.stat").read_text(encoding="ascii").splitlines()]
        of_files = sum(int(row[1]) for row in rows if len(row) == 2 and row[0] in files)
    return None if most >= _UNLIMITED else float(most - max(0, held - of_files))
