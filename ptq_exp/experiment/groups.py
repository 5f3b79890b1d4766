"""The control groups of Linux that this process is in, whose limits are its own: of versions 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def groups_with(controller: str, root: Path = ROOT, membership: Path = MEMBERSHIP) -> Iterator[tuple[int, Path]]:
    """Yield (version, folder) of each group whose `controller` bounds this process: its own, then those around it.

    Args:
        controller: "memory" or "cpu".
        root: where the groups are mounted.
        membership: file with a line "number:controllers:/path" for each hierarchy. In a container the path may be that
            of the host, which is not there, while the container's own group is the root.
    """
    paths = {1: Path(), 2: Path()}
    with suppress(OSError, ValueError):
        for row in membership.read_text(encoding="utf-8").splitlines():
            _, controllers, path = row.split(":", 2)
            if not controllers or controller in controllers.split(","):
                paths[1 if controllers else 2] = Path(path.lstrip("/"))
    for version, top in ((1, root / controller), (2, root)):
        own = paths[version]
        for place in dict.fromkeys((own, *own.parents, Path())):
            if (top / place).is_dir():
                yield version, top / place
