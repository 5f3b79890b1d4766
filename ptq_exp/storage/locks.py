"""Locks that one process at a time holds, of all that share a folder, also over a network file system.

A lock is a folder of numbered files, its generations; the highest number is the one that counts. Whoever creates the
next number holds the lock: creating a file that must not exist yet is the one thing that every file system decides for
one process alone, so two can never take the same generation. Nothing here relies on flock or fcntl.

A generation is free when its file says so, when its process is known to have ended (it ran on this machine), or when
its lease has run out: the owner's thread touches the file all the while, and who waits compares the time of that with
the time of a file that it touches itself. Both are the clock of the file server; those of the machines do not matter.
An owner that was stopped for longer finds a higher number when it goes on: it has lost the lock.
"""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread

from ptq_exp.storage.owner import Owner

_log = logging.getLogger("ptq_exp")
LEASE_SECONDS = 120.0
"""For how long a lock outlives its owner on another machine. Network file systems may show times a minute late."""
_RENEWALS = 6  # of a lease before it runs out
_SHORTEST_POLL, _LONGEST_POLL = 0.1, 2.0  # seconds
_KEPT = 4  # generations that stay, so that an old listing of the folder still names a number that is in use
_FREE = "free\n"


def lock_of(root: Path, kind: str, key: str) -> Path:
    """Return the lock of what is computed under a kind and a key (a digest) in the cache `root`."""
    return root / ".locks" / f"{kind}-{key[:32]}.lease"


@dataclass(frozen=True)
class Generation:
    """What is known of the highest number of a lock.

    Attributes:
        owner: its process; None while that is being written.
        seconds: its lease.
        renewed: when it was touched last, by the clock of the file server.
        free: its owner has said that it is free.
    """

    owner: Owner | None
    seconds: float
    renewed: float
    free: bool = False

    @classmethod
    def read(cls, path: Path) -> Generation | None:
        """Read a generation; None if there is no such file any more."""
        try:
            with open(path, encoding="utf-8") as stream:  # opening it asks the file server for its present times
                text, renewed = stream.read(), os.fstat(stream.fileno()).st_mtime
        except FileNotFoundError:
            return None
        try:
            said = json.loads(text)
            return cls(Owner(**said["owner"]), float(said["seconds"]), renewed)
        except (ValueError, KeyError, TypeError):
            return cls(None, LEASE_SECONDS, renewed, text == _FREE)


class Lease:
    """A lock that this process holds: it is renewed until it is released or lost.

    Attributes:
        waited_for: the owner that was waited for, or None.
    """

    def __init__(self, path: Path, token: str, seconds: float) -> None:
        self.path, self.token, self.seconds = path, token, seconds
        self.waited_for: str | None = None
        self._over = Event()
        self._thread = Thread(target=self._renew, name=f"lease {path.parent.name}", daemon=True)
        self._thread.start()

    def lost(self) -> bool:
        """Whether another process has taken the lock over, because this one had been stopped for too long."""
        try:
            return _newest(self.path.parent) != int(self.path.name) or self.token not in self.path.read_text()
        except FileNotFoundError:
            return True
        except OSError:  # the file server does not answer; who takes the lock over has to wait for it, too
            return False

    def release(self) -> None:
        """Say that the lock is free; of one that was lost nothing is said."""
        self._over.set()
        self._thread.join(timeout=1)  # it may hang together with the file server
        with suppress(OSError):
            if not self.lost():
                with open(self.path, "r+", encoding="utf-8") as stream:  # never creates it
                    stream.write(_FREE)
                    stream.truncate()

    def _renew(self) -> None:
        while not self._over.wait(self.seconds / _RENEWALS):
            if self.lost():
                return
            with suppress(OSError):
                os.utime(self.path)


class _ServerClock:
    """The time of a file server, asked for once: by touching a file in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._ahead = folder, None

    def now(self) -> float:
        if self._ahead is None:
            probe = self._folder / f".{uuid.uuid4().hex}"
            probe.touch(exist_ok=False)
            try:
                os.utime(probe)
                self._ahead = probe.stat().st_mtime - time.monotonic()
            finally:
                probe.unlink(missing_ok=True)
        return self._ahead + time.monotonic()


def try_lock(folder: Path, seconds: float = LEASE_SECONDS, clock: _ServerClock | None = None) -> Lease | Generation:
    """Take the lock `folder` (created) without waiting.

    Returns:
        The lease, or what holds the lock.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clock = clock or _ServerClock(folder)
    token = uuid.uuid4().hex
    said = json.dumps({"owner": asdict(Owner.current()), "seconds": seconds, "token": token}) + "\n"
    number = _newest(folder)
    while True:
        if number and (holder := Generation.read(folder / str(number))) and not _may_be_taken(holder, clock):
            return holder
        number += 1
        if not _created(folder / str(number), said):
            continue  # another process was faster, or the listing was old: look at that one
        if (newest := _newest(folder)) == number:
            break
        (folder / str(number)).unlink(missing_ok=True)  # taken by an old listing
        number = newest
    for old in _numbers(folder):
        if old <= number - _KEPT:
            (folder / str(old)).unlink(missing_ok=True)
    return Lease(folder / str(number), token, seconds)


@contextmanager
def all_free(folders: Iterable[Path]) -> Iterator[bool]:
    """Hold several locks without waiting for any; gives False where somebody else holds one of them.

    Raises:
        OSError: a lock cannot be written.
    """
    with ExitStack() as held:
        free = True
        for folder in folders:
            lease = try_lock(folder)
            if isinstance(lease, Generation):
                free = False
                break
            held.callback(lease.release)
        yield free


@contextmanager
def only_one(folder: Path, what: str, seconds: float = LEASE_SECONDS) -> Iterator[Lease]:
    """Hold the lock `folder`; who has to wait says so once, with the owner's process.

    Args:
        what: is being computed, for the messages.
        seconds: of the lease.

    Raises:
        OSError: the lock cannot be written.
    """
    clock, waited_for, started = None, None, time.monotonic()
    while isinstance(lease := try_lock(folder, seconds, clock), Generation):
        owner = str(lease.owner or "another process")
        clock = clock or _ServerClock(folder)
        if owner != waited_for:
            _log.info("%s: %s is computing it, waiting", what, owner)
            waited_for = owner
        waited = time.monotonic() - started
        time.sleep(min(max(0.05 * waited, _SHORTEST_POLL), _LONGEST_POLL))
    lease.waited_for = waited_for
    try:
        yield lease
    finally:
        lease.release()


def _may_be_taken(holder: Generation, clock: _ServerClock) -> bool:
    if holder.free or (holder.owner is not None and holder.owner.dead()):
        return True
    return clock.now() - holder.renewed > holder.seconds


def _created(path: Path, text: str) -> bool:
    """Create a file with its content; False if it is there already."""
    try:
        with open(path, "x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        return False
    return True


def _numbers(folder: Path) -> list[int]:
    return [int(name) for name in os.listdir(folder) if name.isdigit()]


def _newest(folder: Path) -> int:
    return max(_numbers(folder), default=0)
