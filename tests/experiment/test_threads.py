"""CPU threads by what is free: of cores, quotas and loads that are given, whatever machine the tests run on."""

import math
from functools import partial

import pytest
import torch

from ptq_exp.experiment import threads
from ptq_exp.experiment.groups import groups_with
from ptq_exp.experiment.threads import Watch, choose_threads, threads_for
from ptq_exp.settings.schema_machine import TrainerConfig


@pytest.mark.parametrize(("free", "cores", "wanted"), [
    (2.0, 2, 2), (1.8, 2, 2), (1.7, 2, 1), (1.0, 2, 1), (0.1, 2, 1), (0.0, 64, 1), (63.9, 64, 64), (40.2, 64, 40),
    (64.0, 4, 4), (8.0, 1.5, 1), (2.2, 2, 2),
])
def test_whole_free_cores_are_taken(free, cores, wanted):
    assert threads_for(free, cores) == wanted


def test_what_this_process_uses_itself_is_free():
    before = Watch(10.0, (100.0, 50.0), 3.0)
    assert before.free(Watch(12.0, (102.0, 50.0), 5.0)) == pytest.approx(2.0)  # one idle, one ours
    assert before.free(Watch(12.0, (100.0, 50.0), 5.0)) == pytest.approx(1.0)  # the other belongs to somebody else
    assert before.free(Watch(12.0, (100.0, 50.0), 3.5)) == pytest.approx(0.25)
    assert before.free(Watch(12.0, (), 5.0)) is None and Watch(0.0, (), 0.0).free(Watch(1.0, (), 0.0)) is None


@pytest.fixture
def machine(monkeypatch):
    """Four cores of which `machine(free)` are, and no variable that says how many threads there are."""
    for name in threads._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "SHORTEST", 0.0)
    monkeypatch.setattr(threads, "_quota", lambda: math.inf)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    taken = {}
    monkeypatch.setattr(torch, "set_num_threads", lambda n: taken.update(torch=n))
    monkeypatch.setattr(threads, "threadpool_limits", lambda n, kind: taken.update({kind: n}))

    def of(free, device="cpu", **settings):
        taken.clear()
        monkeypatch.setattr(Watch, "free", lambda self, later: free)
        choose_threads(TrainerConfig(**settings), torch.device(device), Watch.begin())
        return dict(taken)

    return of


def test_the_run_takes_what_is_free_and_says_so(machine, caplog):
    caplog.set_level("INFO", "ptq_exp")
    assert machine(3.0) == {"torch": 3, "blas": 3}
    assert caplog.messages == ["CPU threads: 3, as 3.0 of 4 cores are free; trainer.threads=N sets how many"]
    assert machine(9.0) == {"torch": 4, "blas": 4} and machine(0.2) == {"torch": 1, "blas": 1}


def test_who_says_how_many_threads_decides(machine, monkeypatch):
    assert machine(1.0, threads=7) == {"torch": 7, "blas": 7}
    assert machine(1.0, device="meta") == {} and machine(1.0, devices=2) == {} and machine(None) == {}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert machine(1.0) == {} and machine(1.0, threads=2) == {"torch": 2, "blas": 2}


@pytest.mark.parametrize(("files", "wanted"), [
    ({"cpu.max": "max 100000\n"}, math.inf), ({"cpu.max": "250000 100000\n"}, 2.5), ({"cpu.max": "5000 100000"}, 1.0),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
    ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0), ({}, math.inf),
    ({"cpu.max": "what\n"}, math.inf), ({"cpu.max": "100000 0\n"}, math.inf),
    ({"cpu.max": "300000 100000\n", "job/cpu.max": "max 100000\n"}, 3.0),  # of the group around it
    ({"job/cpu.max": "200000 100000\n", "other/cpu.max": "100000 100000\n"}, 2.0),
    ({"cpu/job/cpu.cfs_quota_us": "150000\n", "cpu/job/cpu.cfs_period_us": "100000\n"}, 1.5),
])
def test_control_groups_may_allow_fewer(tmp_path, monkeypatch, files, wanted):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "membership").write_text("4:cpu,cpuacct:/job\n2:memory:/elsewhere\n0::/job\n")
    monkeypatch.setattr(threads, "groups_with", partial(groups_with, root=tmp_path, membership=tmp_path / "membership"))
    assert threads._quota() == wanted


def test_this_system_is_read():
    found = Watch.begin()
    assert found.own > 0 and (not found.idle or min(found.idle) >= 0)
