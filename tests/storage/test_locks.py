"""One process at a time computes an entry, whoever is killed or stopped, and without a lock of the file system."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from threading import Barrier, Thread

import numpy as np
import pytest

from ptq_exp.storage import locks
from ptq_exp.storage.cache import ArtifactCache
from ptq_exp.storage.locks import Generation, Lease, all_free, only_one, try_lock
from ptq_exp.storage.owner import Owner

# Every process of these tests runs where neither flock nor POSIX locks work, as on many network file systems.
WITHOUT_LOCKS = """
import errno, fcntl
def no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = fcntl.lockf = no_locks
"""
# A process that needs an entry. As the "owner" it says when it computes, and goes on when it is asked to.
PROCESS = WITHOUT_LOCKS + """
import logging, pathlib, sys, time
import numpy as np
from ptq_exp.storage.cache import ArtifactCache

root, role, lease = pathlib.Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
logging.basicConfig(level=logging.INFO, filename=root / f"{role}.log")

def make():
    (root / f"{role} computes").touch()
    while role == "owner" and not (root / "go on").exists():
        time.sleep(0.01)
    return np.full(1000, len(role))

value, reused = ArtifactCache(root / "cache", lease=lease).get_or_make(
    "calibration", {"a": 1}, make=make, save=lambda v, p: np.save(p, v), load=np.load, suffix=".npy")
(root / f"{role} has").write_text(f"{value[0]} {reused}")
"""
COUNTER = WITHOUT_LOCKS + """
import pathlib, sys
from ptq_exp.storage.locks import only_one

root = pathlib.Path(sys.argv[1])
for _ in range(int(sys.argv[3])):
    with only_one(root / "a.lease", "count"):
        (root / "count").write_text(str(int((root / "count").read_text()) + 1))
"""


@pytest.fixture
def processes(tmp_path):
    """Start a process by its role; those that are left are killed."""
    started = []

    def start(role, lease=3600.0, code=PROCESS):
        started.append(subprocess.Popen([sys.executable, "-c", code, tmp_path, role, str(lease)]))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def until(found):
    deadline = time.monotonic() + 60
    while not found():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def owner_and_waiter(processes, folder):
    """An owner that computes, and a second process that has said that it waits for this one."""
    owner = processes("owner")
    until((folder / "owner computes").exists)
    waiter, log = processes("second"), folder / "second.log"
    until(lambda: log.exists() and f"process {owner.pid} on" in log.read_text())
    assert "is computing it, waiting" in log.read_text()
    return owner, waiter


def stored(folder):
    (path,) = (folder / "cache" / "calibration").glob("*/artefact.npy")
    return path


def test_of_two_processes_one_computes_and_the_other_waits(tmp_path, processes):
    owner, waiter = owner_and_waiter(processes, tmp_path)
    (tmp_path / "go on").touch()
    assert (owner.wait(60), waiter.wait(60)) == (0, 0)
    assert (tmp_path / "owner has").read_text() == "5 False"
    assert (tmp_path / "second has").read_text() == "5 True"
    assert not (tmp_path / "second computes").exists()


def test_what_a_killed_process_of_this_machine_computed_is_taken_over_at_once(tmp_path, processes):
    owner, waiter = owner_and_waiter(processes, tmp_path)  # the lease is an hour
    owner.kill()
    assert waiter.wait(60) == 0
    assert (tmp_path / "second has").read_text() == "6 False"
    assert f"process {owner.pid}" in (log := (tmp_path / "second.log").read_text()) and "ended without it" in log
    assert np.load(stored(tmp_path))[0] == 6


def test_a_process_that_was_stopped_past_its_lease_leaves_the_other_ones_entry_alone(tmp_path, processes):
    owner = processes("owner", 0.5)
    until((tmp_path / "owner computes").exists)
    owner.send_signal(signal.SIGSTOP)
    assert processes("second", 0.5).wait(60) == 0
    assert (tmp_path / "second has").read_text() == "6 False"
    before = stored(tmp_path).stat()
    (tmp_path / "go on").touch()
    owner.send_signal(signal.SIGCONT)
    assert owner.wait(60) == 0
    assert "another one has taken it" in (tmp_path / "owner.log").read_text()
    assert (tmp_path / "owner has").read_text() == "6 True"
    assert (stored(tmp_path).stat().st_ino, stored(tmp_path).stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_processes_that_count_together_lose_no_count(tmp_path, processes):
    (tmp_path / "count").write_text("0")
    started = [processes("counts", 15, COUNTER) for _ in range(3)]
    assert [process.wait(60) for process in started] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "45"


def held_by(folder, owner, age, seconds=100.0, number=7):
    """A generation as the owner wrote it, `age` seconds ago by the clock of the file server."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / str(number)
    path.write_text(json.dumps({"owner": asdict(owner), "seconds": seconds, "token": "t"}) + "\n")
    renewed = time.time() - age
    os.utime(path, (renewed, renewed))
    return path


ELSEWHERE = replace(Owner.current(), host="node7", machine="node7/other")


@pytest.mark.parametrize(("age", "free"), [(0, False), (90, False), (110, True), (1e6, True)])
def test_another_machine_is_believed_dead_after_its_own_lease_alone(tmp_path, age, free):
    held_by(tmp_path / "a.lease", ELSEWHERE, age)
    found = try_lock(tmp_path / "a.lease", seconds=1.0)
    if free:
        assert found.path.name == "8"
        found.release()
    else:
        assert isinstance(found, Generation) and str(found.owner) == f"process {os.getpid()} on node7"


def test_clocks_of_machines_are_not_looked_at(tmp_path, monkeypatch):
    held_by(tmp_path / "a.lease", ELSEWHERE, 90)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert isinstance(try_lock(tmp_path / "a.lease"), Generation)
    # a file server whose clock is a day behind this machine's
    touch = os.utime
    monkeypatch.setattr(os, "utime", lambda path, *_: touch(path, (time.monotonic(), time.monotonic())))
    held = try_lock(tmp_path / "b.lease", 50)
    os.utime(held.path)
    assert isinstance(try_lock(tmp_path / "b.lease"), Generation)
    touch(held.path, (time.monotonic() - 60,) * 2)
    taken = try_lock(tmp_path / "b.lease")
    assert isinstance(taken, Lease) and held.lost() and not taken.lost()
    held.release()
    assert not taken.lost() and not Generation.read(taken.path).free  # what was lost is not given away
    taken.release()


@pytest.mark.parametrize(
    ("change", "dead"),
    [({}, False), ({"start": 1}, True), ({"start": 0}, False), ({"pid": 2**22 + 1}, True),
     ({"pid": 2**22 + 1, "machine": "other"}, False), ({"start": 1, "machine": "other"}, False)],
)
def test_which_owners_are_known_to_be_dead(change, dead):
    if Owner.current().start == 0 and "start" in change:
        pytest.skip("the system does not say when a process was started")
    assert replace(Owner.current(), **change).dead() == dead


def test_a_killed_process_that_nobody_has_waited_for_is_dead():
    process = subprocess.Popen(["sleep", "60"])
    owner = replace(Owner.current(), pid=process.pid, start=0)
    assert not owner.dead()
    process.kill()
    until(owner.dead)
    process.wait()


def test_of_many_takers_of_an_expired_lease_one_wins(tmp_path):
    rounds, takers, won = 20, 6, []

    def take(barrier, folder):
        barrier.wait()
        won.append((folder, try_lock(folder)))

    for n in range(rounds):
        folder, barrier = tmp_path / f"{n}.lease", Barrier(takers)
        held_by(folder, ELSEWHERE, 1000)
        threads = [Thread(target=take, args=(barrier, folder)) for _ in range(takers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(won) == rounds * takers
    leases = [folder for folder, found in won if isinstance(found, Lease)]
    assert len(leases) == len(set(leases)) == rounds


@pytest.mark.parametrize("listed", [[], [3], [5, 6]])
def test_an_old_listing_of_the_folder_takes_nothing(tmp_path, monkeypatch, listed):
    folder = tmp_path / "a.lease"
    for number in (4, 5, 6, 7):
        held_by(folder, ELSEWHERE, 0 if number == 7 else 1000, number=number)
    shown = [listed]
    numbers = locks._numbers
    monkeypatch.setattr(locks, "_numbers", lambda path: shown.pop() if shown else numbers(path))
    assert isinstance(try_lock(folder), Generation)
    assert sorted(os.listdir(folder)) == ["4", "5", "6", "7"]


def test_few_generations_stay_and_a_released_lock_is_free(tmp_path):
    for _ in range(10):
        with only_one(tmp_path / "a.lease", "count") as lease:
            assert not lease.lost() and lease.waited_for is None
    assert sorted(map(int, os.listdir(tmp_path / "a.lease"))) == [7, 8, 9, 10]


def test_a_lock_is_renewed_while_it_is_held(tmp_path):
    with only_one(tmp_path / "a.lease", "x", seconds=0.3) as lease:
        os.utime(lease.path, (0, 0))
        until(lambda: lease.path.stat().st_mtime > 0)


def test_a_lock_whose_folder_was_removed_is_lost(tmp_path):
    with only_one(tmp_path / "a.lease", "x") as lease:
        for path in (tmp_path / "a.lease").iterdir():
            path.unlink()
        assert lease.lost()
        held_by(tmp_path / "a.lease", ELSEWHERE, 0, number=1)  # somebody else's, with the same number
        assert lease.lost()
    assert Generation.read(tmp_path / "a.lease" / "1").owner == ELSEWHERE


@pytest.mark.parametrize("text", ["", '{"owner": {', "[]", '{"owner": 3, "seconds": 1}'])
def test_a_generation_that_is_not_written_yet_is_held(tmp_path, text):
    path = held_by(tmp_path / "a.lease", ELSEWHERE, 0)
    path.write_text(text)
    with all_free([tmp_path / "b.lease", tmp_path / "a.lease"]) as free:
        assert not free
    with all_free([tmp_path / "b.lease"]) as free:  # let go of again
        assert free
    os.utime(path, (0, 0))
    with all_free([tmp_path / "a.lease"]) as free:
        assert free


def test_a_value_whose_lock_was_lost_to_one_that_died_is_stored(tmp_path, caplog):
    cache = ArtifactCache(tmp_path)

    def make():
        (folder,) = (tmp_path / ".locks").iterdir()
        held_by(folder, replace(Owner.current(), pid=2**22 + 1), 0, number=2)
        return np.ones(3)

    for reused in (False, True):
        with caplog.at_level(logging.WARNING):
            found = cache.get_or_make("calibration", {"a": 1}, make=make, save=lambda value, path: np.save(path, value),
                                      load=np.load, suffix=".npy")
        assert found[1] is reused and found[0].tolist() == [1, 1, 1]
    assert caplog.text.count("another one has taken it") == 1
