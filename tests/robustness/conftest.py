"""The command in a process of its own, forked from this one so that torch is loaded already."""

import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from small_networks import use_blank_pictures, use_one_composition, use_small_networks

import ptq_exp.experiment.experiment  # noqa: F401  loaded before the fork
from ptq_exp.cli.main import main

SMALL = [
    "sampler.steps=2", "evaluation.n_samples=6", "evaluation.batch_size=2", "evaluation.eps_error_samples=2",
    "evaluation.grid_images=2", "evaluation.fid_resamples=2",
    "calibration.n_samples=4", "calibration.batch_size=2", "correction.n_samples=4",
    "correction.batch_size=2", "metric=minmax", "logger=none", "trainer.progress_bar=false", "trainer.accelerator=cpu",
]
TICK = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Ended:
    """How a job ended: its exit status (-9 = killed), what it printed, the CPU seconds that it took."""

    status: int
    output: str
    cpu_seconds: float

    @property
    def error(self) -> str:
        """The one line that it ended with."""
        assert self.status == 1 and "Traceback" not in self.output and "Logging error" not in self.output, self.output
        (line,) = [line for line in self.output.splitlines() if line.startswith("error: ")]
        return line


@pytest.fixture(scope="session")
def job(tmp_path_factory):
    """Run the command with small settings in a forked process.

    Arguments: overrides, and `kill_at`, CPU seconds after which it gets SIGKILL; `limit_kb`: the largest file;
    `small`: on a small network.
    """

    def run(*overrides: str, kill_at: float | None = None, limit_kb: int | None = None, small: bool = False) -> Ended:
        log = tmp_path_factory.mktemp("output") / "output.txt"
        pid = os.fork()
        if pid == 0:
            patch = pytest.MonkeyPatch()
            use_blank_pictures(patch)
            use_one_composition(patch)
            if small:
                use_small_networks(patch)
            _child([*SMALL, *overrides], log, limit_kb)
        while kill_at is not None and (spent := _cpu_seconds(pid)) is not None:
            if spent >= kill_at:
                os.kill(pid, signal.SIGKILL)
                break
            time.sleep(TICK)
        _, status, used = os.wait4(pid, 0)
        text = log.read_text() if log.exists() else ""
        return Ended(os.waitstatus_to_exitcode(status), text, used.ru_utime + used.ru_stime)

    return run


def _child(overrides: list[str], log: Path, limit_kb: int | None) -> None:
    """Be the command, and never come back."""
    status = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
        if limit_kb is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_kb * 1024, resource.RLIM_INFINITY))
        sys.argv = ["ptq-exp", *overrides]
        status = 0
        main()
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 70
    finally:
        sys.stdout.flush()
        os._exit(status)


def _cpu_seconds(pid: int) -> float | None:
    """CPU time of a running child; None when it has ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return None if fields[0] == "Z" else (int(fields[11]) + int(fields[12])) * TICK


@pytest.fixture
def mounted(tmp_path):
    """Make a small file system of its own in memory: `mounted(kilobytes)`; `mounted(read_only=path)` freezes it."""
    made = []

    def make(kilobytes: int = 0, read_only: Path | None = None) -> Path:
        path = read_only or tmp_path / f"disk{len(made)}"
        path.mkdir(exist_ok=True)
        options = "remount,ro" if read_only else f"size={kilobytes}k"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no permission to mount a small disk: {done.stderr.strip()}")
        made.append(path)
        return path

    yield make
    for path in dict.fromkeys(made):
        subprocess.run(["umount", path], check=True)
