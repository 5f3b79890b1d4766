"""Tasks side by side: their order, their threads, what they raise, and what they leave as it was."""

import multiprocessing
import subprocess
import sys
import threading
import time
from contextvars import ContextVar

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ptq_exp.parallel import side_by_side, tasks


@pytest.fixture
def threads():
    """Three threads of torch, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_tasks_that_run_at_the_same_time(threads):
    meeting = threading.Barrier(3)  # nobody gets past it alone

    def task(number):
        meeting.wait(timeout=30)
        return number, torch.get_num_threads()

    assert side_by_side([lambda n=n: task(n) for n in range(3)]) == [(0, 1), (1, 1), (2, 1)]
    assert torch.get_num_threads() == 3
    assert _of_a_new_thread(torch.get_num_threads) == 3


def test_two_tasks_share_five_threads(threads):
    torch.set_num_threads(5)
    assert side_by_side([torch.get_num_threads] * 2) == [2, 2]


def test_with_one_thread_all_tasks_run_here(threads):
    torch.set_num_threads(1)
    assert side_by_side([threading.current_thread] * 2) == [threading.current_thread()] * 2
    torch.set_num_threads(3)
    assert side_by_side([threading.current_thread]) == [threading.current_thread()]
    assert side_by_side([]) == []


def test_gradients_are_recorded_where_the_caller_records_them(threads):
    def recorded():
        return torch.is_grad_enabled()

    assert side_by_side([recorded] * 3) == [True] * 3
    with torch.no_grad():
        assert side_by_side([recorded] * 3) == [False] * 3


@pytest.mark.parametrize("cached", [True, False])
def test_autocast_is_that_of_the_caller(threads, cached):
    def product():
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype, torch.is_autocast_cache_enabled()

    with torch.no_grad(), torch.autocast("cpu", torch.float16, cache_enabled=cached):
        assert side_by_side([product] * 3) == [(torch.float16, cached)] * 3
        with torch.autocast("cpu", enabled=False):
            assert side_by_side([product] * 3) == [product()] * 3
    assert side_by_side([product] * 3) == [(torch.float32, True)] * 3


def test_what_was_made_in_inference_mode_is_changed_in_place(threads):
    with torch.inference_mode():
        numbers = torch.zeros(3)
        side_by_side([lambda n=n: numbers[n].add_(n) for n in range(3)])
        assert numbers.tolist() == [0, 1, 2]
    assert side_by_side([torch.is_inference_mode_enabled] * 3) == [False] * 3


def test_context_variables_are_those_of_the_caller(threads):
    variable = ContextVar("variable", default=0)
    token = variable.set(1)
    try:
        assert side_by_side([variable.get] * 3) == [1] * 3
    finally:
        variable.reset(token)
    assert side_by_side([variable.get] * 3) == [0] * 3


@pytest.mark.parametrize("watch", [
    lambda: FlopCounterMode(display=False), lambda: torch.device("meta"), torch.profiler.profile,
], ids=["dispatch", "function", "profiler"])
def test_what_watches_the_caller_alone_sees_all_tasks(threads, watch):
    with watch():
        assert side_by_side([threading.current_thread] * 3) == [threading.current_thread()] * 3
    assert threading.current_thread() not in side_by_side([threading.current_thread] * 3)


def test_a_task_in_a_task_runs_there(threads):
    def inner():
        return side_by_side([threading.current_thread] * 2) == [threading.current_thread()] * 2

    assert side_by_side([inner] * 3) == [True] * 3


def test_the_first_error_is_raised_when_the_others_have_ended_and_the_rest_has_not_begun(threads):
    meeting, done, begun = threading.Barrier(3), [], []

    def fail():
        meeting.wait(timeout=30)
        raise ValueError("the second of the first three")

    def slow():
        meeting.wait(timeout=30)
        time.sleep(0.2)
        done.append(1)

    with pytest.raises(ValueError, match="second of the first"):
        side_by_side([slow, fail, slow, *[lambda: begun.append(1)] * 200])
    assert len(done) == 2
    assert not begun
    assert side_by_side([int] * 5) == [0] * 5  # the workers go on


def test_a_task_that_was_left_out_before_the_one_that_failed_hides_no_error(threads, monkeypatch):
    failed, run = threading.Event(), tasks._run

    def late(task, *rest):  # the worker of the first task is slow to begin it
        if task is int:
            failed.wait(timeout=30)
        try:
            return run(task, *rest)
        finally:
            failed.set()

    def fail():
        raise ValueError("the second")

    monkeypatch.setattr(tasks, "_run", late)
    with pytest.raises(ValueError, match="the second"):
        side_by_side([int, fail])


def test_each_end_is_told_to_the_caller(threads):
    told = []
    side_by_side([int] * 7, lambda: told.append(threading.current_thread()))
    assert told == [threading.current_thread()] * 7


def test_a_forked_process_has_workers_of_its_own(threads):
    side_by_side([int] * 3)
    child = multiprocessing.get_context("fork").Process(target=side_by_side, args=([int] * 3,))
    child.start()
    child.join(timeout=60)
    assert child.exitcode == 0


@pytest.mark.parametrize("before", ["side_by_side([int] * 3)", ""])
def test_a_thread_that_outlives_the_interpreter_goes_on_alone(before):
    script = f"""
import threading, torch
from ptq_exp.parallel import side_by_side
torch.set_num_threads(3)
{before}
def late():
    while not threading._SHUTTING_DOWN:
        pass
    threading.Event().wait(0.2)
    print(side_by_side([threading.current_thread] * 3) == [threading.current_thread()] * 3)
threading.Thread(target=late).start()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["True"], done.stderr


def test_where_no_more_threads_can_be_begun_all_tasks_run_here(threads, monkeypatch):
    start, begun = threading.Thread.start, []

    def few(thread):
        if len(begun) == 2:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        start(thread)

    torch.set_num_threads(7)  # no pool is there yet
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", few)
        assert side_by_side([threading.current_thread] * 7) == [threading.current_thread()] * 7
    assert torch.get_num_threads() == _of_a_new_thread(torch.get_num_threads) == 7
    assert not any(thread.is_alive() for thread in begun)
    assert threading.current_thread() not in side_by_side([threading.current_thread] * 7)


def _of_a_new_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]
