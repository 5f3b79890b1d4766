"""What lies in a cache folder: whole entries, pieces of unfinished runs, and what killed runs left half-written."""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ptq_exp.errors import DataError
from ptq_exp.storage.atomic import file_digest
from ptq_exp.storage.locks import lock_of
from ptq_exp.storage.plain_json import read_json

PARTS = "parts"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_HALF_WRITTEN = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp(\.\w+)?")
HALF_WRITTEN = "half-written"
"""The problem of what a killed run, or one that is at work, has not completed."""


def temporary(path: Path) -> Path:
    """Return a name beside `path` for what is not complete, or on its way out; no other process uses the same."""
    return path.with_name(f".{path.name.lstrip('.')[:16]}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")


@dataclass(frozen=True)
class Entry:
    """Something in the cache that can be removed as a whole.

    Attributes:
        path: its folder, or file.
        kind: such as "calibration"; `PARTS` for the pieces of an unfinished run.
        size: bytes of all its files.
        made, used: seconds since the epoch of the first file, and of the last reading or writing. `used` does not
            rely on the access times of the file system, which may be recorded once a day or never.
        problem: why it is of no use (`HALF_WRITTEN`, damaged), or None.
    """

    path: Path
    kind: str
    size: int
    made: float
    used: float
    problem: str | None = None

    def locks(self, root: Path) -> list[Path]:
        """Return the locks in the cache `root` of a process that writes the entry, or makes it from pieces."""
        kind, name = self.path.relative_to(root).parts[:2]
        digest = name.lstrip(".").partition(".")[0]
        found = set((root / ".locks").glob(f"*-{digest[:16]}*.lease"))
        # of a whole digest the kind's own lock, too, which need not be there yet
        return sorted(found | ({lock_of(root, kind, digest)} if _DIGEST.fullmatch(digest) else set()))


def entries(root: Path, *, verify: bool = False) -> list[Entry]:
    """All entries of a cache; nothing else in the folder is looked at, so that a wrong `root` does no harm.

    Args:
        verify: compare checksums (reads every file), not only the presence of files.

    Raises:
        DataError: `root` is no folder that can be read.
    """
    if not root.exists():
        return []
    try:
        return sorted(_found(root, verify), key=lambda entry: (entry.kind, -entry.used, entry.path))
    except OSError as error:
        raise DataError(f"cache_dir={root} cannot be read: {error.strerror or error}") from error


def _found(root: Path, verify: bool) -> Iterator[Entry]:
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        for path in sorted(folder.iterdir()):
            if _HALF_WRITTEN.fullmatch(path.name):
                yield _entry(path, folder.name, HALF_WRITTEN)
            elif _DIGEST.fullmatch(path.name) and path.is_dir():
                if folder.name != PARTS:
                    problem = damage(path, verify)
                    yield _entry(path, folder.name, problem and f"damaged: {problem}")
                    continue
                yield _entry(path, PARTS)
                yield from _half_written_files(path)


def _half_written_files(folder: Path) -> Iterator[Entry]:
    for path in _below(folder):
        if _HALF_WRITTEN.fullmatch(path.name):
            yield _entry(path, PARTS, HALF_WRITTEN)


def _entry(path: Path, kind: str, problem: str | None = None) -> Entry:
    size, times, used = 0, [time.time()], 0.0
    for file in _below(path):
        with suppress(FileNotFoundError):  # a live run renames and removes
            found = file.stat()
            times.append(found.st_mtime)
            used = max(used, found.st_mtime)
            if file.is_file():
                size += found.st_size
                # listing the cache reads entry.json, and that is no use of the entry
                used = max(used, found.st_atime if file.name != "entry.json" else 0)
    return Entry(path, kind, size, min(times), used, problem)


def _below(path: Path) -> Iterator[Path]:
    """Return the file or folder itself, and all that lies in it."""
    yield path
    for folder, folders, files in os.walk(path):  # passes over what vanishes meanwhile
        yield from (Path(folder) / name for name in (*folders, *files))


def damage(entry: Path, verify: bool = True) -> str | None:
    """Say why a complete-looking entry is of no use; None if it is whole. `verify` compares its checksum, too."""
    try:
        record = read_json(entry / "entry.json")
        artefact, expected = entry / record["artefact"], record["sha256"]
        before = artefact.stat()
    except (DataError, OSError, KeyError, TypeError):
        return "its record or its file is missing"
    if not verify:
        return None
    try:
        found = file_digest(artefact)
        os.utime(artefact, ns=(before.st_atime_ns, before.st_mtime_ns))  # looking at it is not using it
    except (DataError, OSError) as error:
        return str(error)
    return None if found == expected else "its checksum differs"


def total(found: Iterable[Entry]) -> int:
    """Bytes of several entries; files inside another one are counted once."""
    found = list(found)
    folders = {entry.path for entry in found}
    return sum(entry.size for entry in found if not folders & set(entry.path.parents))
