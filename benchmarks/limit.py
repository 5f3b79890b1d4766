"""Run a command in a control group of its own with a memory limit: whatever exceeds it is ended by the system.

    python benchmarks/limit.py GIGABYTES COMMAND ...

The limit (memory.limit_in_bytes, or memory.max) counts all memory of the command and its children from their first
instruction on, pages of files included: those are given back under pressure, anonymous memory cannot be. It takes the
rights to make a control group. At the end the peak is printed to stderr.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def main(limit: float, command: list[str]) -> int:
    """Return the exit status of the command."""
    version_1 = Path("/sys/fs/cgroup/memory")
    root, bound, peak = (
        (version_1, "memory.limit_in_bytes", "memory.max_usage_in_bytes") if version_1.exists() else
        (Path("/sys/fs/cgroup"), "memory.max", "memory.peak")
    )
    group = root / f"ptq_exp_{os.getpid()}"
    group.mkdir()
    (group / bound).write_text(str(int(limit)))

    def enter() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    try:
        status = subprocess.run(command, preexec_fn=enter, check=False).returncode
        print(f"peak of the group: {int((group / peak).read_text()) / 1e9:.2f} GB of {limit / 1e9:g}", file=sys.stderr)
        return status
    finally:
        group.rmdir()


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(1e9 * float(sys.argv[1]), sys.argv[2:]))
