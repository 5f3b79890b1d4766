"""Which process it is that holds a lock, and whether it still lives, as far as this machine can say."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_ENDED = ("Z", "X")  # states of a process that was killed, but whose parent has not looked at it yet


@dataclass(frozen=True)
class Owner:
    """A process.

    Attributes:
        host: the machine's name, for messages.
        machine: what process numbers are unique in: the machine since it was started, and the container.
        pid: its number.
        start: when it was started, in the system's ticks: numbers are given again; 0 where the system does not say.
    """

    host: str
    machine: str
    pid: int
    start: int

    @classmethod
    def current(cls) -> Owner:
        """Return this process."""
        return cls(socket.gethostname(), _machine(), os.getpid(), (_state_and_start(os.getpid()) or ("", 0))[1])

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def dead(self) -> bool:
        """Whether the process is known to have ended; of another machine or container nothing is known."""
        if self.machine != _machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:  # it belongs to another user
            pass
        state, start = _state_and_start(self.pid) or ("", 0)
        return state in _ENDED or (0 not in (start, self.start) and start != self.start)


@cache
def _machine() -> str:
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    return "/".join(parts)


def _state_and_start(pid: int) -> tuple[str, int] | None:
    """Return state and start of a process as Linux writes them (proc(5)); None where it does not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = text.rpartition(")")[2].split()  # the name of the program, in brackets, may hold anything
        return fields[0], int(fields[19])
    except (OSError, IndexError, ValueError):
        return None
