"""What lies in a cache folder: whole entries, pieces of unfinished runs, and what killed runs left half-written."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ptq_exp.errors import DataError
from ptq_exp.storage.atomic import file_digest
from ptq_exp.storage.plain_json import read_json

PARTS = "parts"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_HALF_WRITTEN = re.compile(r"\..+\.(\d+)-[0-9a-f]{8}\.tmp(\.\w+)?")


@dataclass(frozen=True)
class Entry:
    """Something in the cache that can be removed as a whole.

    Attributes:
        path: its folder, or file.
        kind: such as "calibration"; `PARTS` for the pieces of an unfinished run.
        size: bytes of all its files.
        made, used: seconds since the epoch of the first file, and of the last reading or writing. `used` does not
            rely on the access times of the file system, which may be recorded once a day or never.
        problem: why it is of no use (half-written, damaged), or None.
        writer: the process that was writing a half-written one.
    """

    path: Path
    kind: str
    size: int
    made: float
    used: float
    problem: str | None = None
    writer: int | None = None

    def locks(self) -> list[Path]:
        """Lock files beside the entry and in it."""
        inside = self.path.rglob("*.lock") if self.path.is_dir() else ()
        return [*(path for path in self.beside() if path.suffix == ".lock"), *inside]

    def beside(self) -> list[Path]:
        """Files next to the entry that belong to it, such as locks."""
        name = self.path.name
        return [path for path in self.path.parent.iterdir() if path.name.lstrip(".").startswith(f"{name}.")]


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
            if match := _HALF_WRITTEN.fullmatch(path.name):
                yield _entry(path, folder.name, "half-written", int(match[1]))
            elif _DIGEST.fullmatch(path.name) and path.is_dir():
                if folder.name != PARTS:
                    yield _entry(path, folder.name, _damage(path, verify))
                    continue
                yield _entry(path, PARTS)
                yield from _half_written_files(path)


def _half_written_files(folder: Path) -> Iterator[Entry]:
    for path in _below(folder):
        if match := _HALF_WRITTEN.fullmatch(path.name):
            yield _entry(path, PARTS, "half-written", int(match[1]))


def _entry(path: Path, kind: str, problem: str | None = None, writer: int | None = None) -> Entry:
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
    return Entry(path, kind, size, min(times), used, problem, writer)


def _below(path: Path) -> Iterator[Path]:
    """Return the file or folder itself, and all that lies in it."""
    yield path
    for folder, folders, files in os.walk(path):  # passes over what vanishes meanwhile
        yield from (Path(folder) / name for name in (*folders, *files))


def _damage(entry: Path, verify: bool) -> str | None:
    """Why a complete-looking entry is of no use, or None."""
    try:
        record = read_json(entry / "entry.json")
        artefact, expected = entry / record["artefact"], record["sha256"]
        before = artefact.stat()
    except (DataError, OSError, KeyError, TypeError):
        return "damaged: its record or its file is missing"
    if not verify:
        return None
    try:
        found = file_digest(artefact)
        os.utime(artefact, ns=(before.st_atime_ns, before.st_mtime_ns))  # looking at it is not using it
    except (DataError, OSError) as error:
        return f"damaged: {error}"
    return None if found == expected else "damaged: its checksum differs"


def total(found: Iterable[Entry]) -> int:
    """Bytes of several entries; files inside another one are counted once."""
    found = list(found)
    folders = {entry.path for entry in found}
    return sum(entry.size for entry in found if not folders & set(entry.path.parents))
