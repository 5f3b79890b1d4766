"""Which entries of a cache may go, and removing them; never one that a live process computes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ptq_exp.errors import PTQError
from ptq_exp.storage.entries import HALF_WRITTEN, PARTS, Entry, temporary, total
from ptq_exp.storage.locks import all_free

DAY = 86400


@dataclass(frozen=True)
class Limits:
    """What may stay; None = no limit. `everything`: nothing stays."""

    older_than_days: float | None = None
    max_bytes: float | None = None
    everything: bool = False


def held(root: Path, entry: Entry) -> bool:
    """Whether a live process writes the entry, or what its pieces belong to: it holds its lock."""
    with _lock(root, entry) as free:
        return not free


def chosen(found: Sequence[Entry], limits: Limits, is_held: Callable[[Entry], bool]) -> list[tuple[Entry, str]]:
    """Choose the entries that go, and say why: useless ones, then those beyond the limits, least recently used first.

    What `is_held` counts for `max_bytes`, but others go in its place.
    """
    now = time.time()
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
            if size > limits.max_bytes and not is_held(entry):
                gone[entry] = "least recently used, beyond --max-size"
                size -= entry.size
    return list(gone.items())


def remove(root: Path, entry: Entry) -> bool:
    """Remove an entry unless a live process holds its lock; returns whether it is gone.

    It is renamed first, so that nobody sees it half removed. Who reads its file goes on: the system keeps what is open
    (on a network file system: on the machine that has removed it).

    Raises:
        PTQError: it cannot be removed.
    """
    trash = temporary(entry.path)
    with _lock(root, entry) as free:
        if not free:
            return False
        try:
            entry.path.rename(trash)
            if trash.is_dir():
                shutil.rmtree(trash)
            else:
                trash.unlink()
        except FileNotFoundError:
            pass  # somebody else was faster
        except OSError as error:
            reason = error.strerror or error
            raise PTQError(f"cannot remove {entry.path}: {reason}; is the folder writable?") from error
    return True


@contextmanager
def _lock(root: Path, entry: Entry) -> Iterator[bool]:
    """Hold the entry's locks; gives False where somebody else does, or where nobody can know and it is not whole."""
    with ExitStack() as stack:
        try:
            free = stack.enter_context(all_free(entry.locks(root)))
        except OSError:  # a file system that is read alone
            free = entry.kind != PARTS and entry.problem != HALF_WRITTEN
        yield free
