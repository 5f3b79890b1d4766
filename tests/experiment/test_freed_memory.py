"""Freed memory stays with the process where the C library is glibc, unless the environment decides."""

import subprocess
import sys

import pytest

from ptq_exp.experiment import freed_memory
from ptq_exp.experiment.freed_memory import keep_freed_memory

PAGES = """
import resource, torch
from ptq_exp.experiment.freed_memory import keep_freed_memory
kept = keep_freed_memory()
torch.set_num_threads(1)
def some():
    return [torch.ones(1 << 22) for _ in range(6)]  # 96 MB, free at its end
for _ in range(3):
    some()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    some()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_the_next_tensor_takes_the_pages_of_a_freed_one():
    """Left alone glibc mostly brings in all pages each time, 245,760 of 4 KB here, and at times none."""
    kept, faults = _run()
    if kept == "False":
        pytest.skip("the C library is not glibc")
    assert faults < 10_000


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_the_environment_decides(name, monkeypatch):
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", lambda *_: pytest.fail("the library was asked"))
    monkeypatch.setenv(name, "1")
    assert not keep_freed_memory()


def test_another_library_is_left_alone(monkeypatch):
    for name in [name for name in freed_memory.os.environ if name.startswith(("MALLOC_", "GLIBC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", lambda *_: object())
    assert not keep_freed_memory()


def _run():
    found = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True)
    kept, faults = found.stdout.split()
    return kept, int(faults)
