"""Which parts of a cache live processes work with: runs say that they are there, and open files show."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ptq_exp.errors import PTQError

USERS = ".users"
_SETTLED = 60  # seconds after which a mark without a lock is no run that just starts
_FRESH = 3600  # seconds for which a lock is believed whose owner it does not name
_PID = re.compile(rb"(?<![\w.])(\d{1,7})(?![\w.])")


@contextmanager
def using(root: str | os.PathLike) -> Iterator[None]:
    """Mark the cache `root` as used by this process until the block ends; a killed process's mark counts no more.

    The mark is a file in `root/.users` under a lock that the system releases with the process.

    Raises:
        PTQError: the folder cannot be made or written; the message names it.
    """
    path = Path(root) / USERS / f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = open(path, "wb")
    except OSError as error:
        raise PTQError(
            f"cannot write to cache_dir={root}: {error.strerror or error}; choose a folder that can be written, or "
            "free space there"
        ) from error
    try:
        with suppress(OSError):  # a file system without locks: open files still show who reads
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        stream.close()


def users(root: str | os.PathLike) -> list[str]:
    """`host.pid` of each live process that works with the cache; marks of killed ones are removed."""
    found = []
    for path in sorted((Path(root) / USERS).glob("*.*.*")):
        if _locked(path):
            found.append(path.name.rpartition(".")[0])
        else:
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _SETTLED:
                    path.unlink()
    return found


def alive(pid: int) -> bool:
    """Whether a process of this machine has the number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True


def lock_held(path: Path) -> bool:
    """Whether a lock file, of whatever make, protects something: locked by a process, or fresh with a live owner."""
    if _locked(path):
        return True
    try:
        content, age = path.read_bytes()[:4096], time.time() - path.stat().st_mtime
    except OSError:
        return False
    pids = [int(number) for number in _PID.findall(content)]
    if pids:
        return any(alive(pid) for pid in pids if pid)
    return bool(content.strip()) and age < _FRESH


def open_files(root: str | os.PathLike) -> set[Path] | None:
    """Files below `root` that a process has open or mapped, as far as it may be asked; None where nobody knows."""
    top = str(Path(root).resolve())
    if not Path("/proc/self/fd").exists():
        return None
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            lines = (process / "maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
            found |= {line[line.index("/") :] for line in lines if top in line}
        with suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                with suppress(OSError):
                    found.add(os.readlink(descriptor))
    return {Path(name) for name in found if name.startswith(f"{top}{os.sep}")}


def _locked(path: Path) -> bool:
    """Whether a process holds a lock on the file."""
    try:
        with open(path, "rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
