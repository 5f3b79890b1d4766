"""Locks that one process at a time holds, of those that share a folder; the system frees them when the owner dies."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

_log = logging.getLogger("ptq_exp")
_POLL_SECONDS = 0.1


def lock_of(root: Path, kind: str, key: str) -> Path:
    """Return the lock file of what is computed under a kind and a key (a digest) in the cache `root`."""
    return root / ".locks" / f"{kind}-{key[:32]}.lock"


@contextmanager
def all_free(paths: Iterable[Path]) -> Iterator[bool]:
    """Hold several locks without waiting for any; gives False where somebody else holds one of them.

    Raises:
        OSError: a lock file cannot be written.
        NotImplementedError: the file system has no locks.
    """
    with ExitStack() as held:
        try:
            for path in paths:
                path.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(path).acquire(timeout=0))
            free = True
        except Timeout:
            free = False
        yield free


@contextmanager
def only_one(path: Path, what: str) -> Iterator[str | None]:
    """Hold the lock file `path` (created, and never removed: removing it would race with those who wait).

    Who has to wait says so once, with the owner's process. The lock belongs to the open file, so that the system
    itself frees it when the owner ends, however that happens. On a file system without locks a warning is logged and
    nobody waits.

    Args:
        what: is being computed, for the messages.

    Yields:
        None, or the owner that was waited for ("process 4711 on host").

    Raises:
        OSError: the lock file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, waited_for = FileLock(path), None
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waited_for = _owner(path)
            _log.info("%s: %s is computing it, waiting", what, waited_for)
            lock.acquire(poll_interval=_POLL_SECONDS)
        _owner_file(path).write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    except NotImplementedError:
        _log.warning("%s knows no file locks: several runs may compute the same thing at once", path.parent)
    try:
        yield waited_for
    finally:
        lock.release()


def _owner_file(path: Path) -> Path:
    return path.with_suffix(".owner")


def _owner(path: Path) -> str:
    try:
        return _owner_file(path).read_text(encoding="utf-8", errors="replace") or "another process"
    except OSError:  # it has just taken the lock
        return "another process"
