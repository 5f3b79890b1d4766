"""Which entries of a cache may go, and removing them; never one that a live process works with."""

from __future__ import annotations

import os
import shutil
import socket
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ptq_exp.errors import PTQError
from ptq_exp.storage.entries import PARTS, Entry, total
from ptq_exp.storage.in_use import alive, lock_held, open_files, users

DAY = 86400


@dataclass(frozen=True)
class Limits:
    """What may stay; None = no limit. `everything`: nothing stays."""

    older_than_days: float | None = None
    max_bytes: float | None = None
    everything: bool = False


@dataclass(frozen=True)
class Signs:
    """What shows which entries live processes work with: `live` runs on this cache, and the files that are `opened`."""

    live: list[str]
    opened: set[Path] | None

    @classmethod
    def of(cls, root: Path) -> Signs:
        """Now; they change, so look again before removing something."""
        return cls(users(root), open_files(root))

    def why(self, entry: Entry) -> str | None:
        """Return the sign that a live process works with the entry, or None."""
        if entry.writer is not None and entry.writer != os.getpid() and alive(entry.writer):
            return f"process {entry.writer} is writing it"
        if entry.writer is not None and any(not user.startswith(f"{socket.gethostname()}.") for user in self.live):
            return "a run on another machine may be writing it"
        if entry.kind == PARTS and entry.writer is None and self.live:
            return f"the live run {self.live[0]} may continue it"
        if any(lock_held(lock) for lock in entry.locks()):
            return "a process holds its lock"
        if self.opened is None:
            return f"the live run {self.live[0]} may read it" if self.live else None
        place = entry.path.resolve()
        if any(place == path or place in path.parents for path in self.opened):
            return "a process has it open"
        return None


def chosen(found: Sequence[Entry], limits: Limits, signs: Signs, now: float | None = None) -> list[tuple[Entry, str]]:
    """Return the entries that go, and why: useless ones first, then those beyond the limits, least recently used first.

    What is in use counts for `max_bytes`, but others go in its place.
    """
    now = time.time() if now is None else now
    gone = {entry: entry.problem for entry in found if entry.problem}
    rest = sorted((entry for entry in found if entry not in gone), key=lambda entry: (entry.used, entry.path))
    if limits.everything:
        return list((gone | dict.fromkeys(rest, "--all")).items())
    for entry in rest:
        if limits.older_than_days is not None and now - entry.used > limits.older_than_days * DAY:
            gone[entry] = "not used for longer than --older-than"
    if limits.max_bytes is not None:
        kept = [entry for entry in rest if entry not in gone]
        size = total(kept)
        for entry in kept:
            if size > limits.max_bytes and not signs.why(entry):
                gone[entry] = "least recently used, beyond --max-size"
                size -= entry.size
    return list(gone.items())


def remove(root: Path, entry: Entry) -> None:
    """Remove an entry: rename first, so that nobody sees it half removed.

    Raises:
        PTQError: it cannot be removed.
    """
    trash = entry.path.with_name(f".{entry.path.name.lstrip('.')[:16]}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    beside = entry.beside()
    try:
        entry.path.rename(trash)
        if trash.is_dir():
            shutil.rmtree(trash)
        else:
            trash.unlink()
    except FileNotFoundError:
        return  # somebody else was faster
    except OSError as error:
        raise PTQError(f"cannot remove {entry.path}: {error.strerror or error}; is the folder writable?") from error
    if not users(root):  # a run that waits for a lock must find the same file
        for path in beside:
            if path.is_file() and not lock_held(path):
                with suppress(OSError):
                    path.unlink()
