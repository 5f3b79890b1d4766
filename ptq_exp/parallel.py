"""Tasks side by side on the CPU threads that torch was given.

Many small operations one after the other gain little from several threads each: they are waited for more than they
compute. Tasks that do not depend on each other gain more, one task on each thread. Python itself runs one thread at a
time: operations of microseconds gain nothing so, either.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")


def side_by_side(tasks: Sequence[Callable[[], T]], on_done: Callable[[], object] = lambda: None) -> list[T]:
    """Return the results of `tasks`, in their order; each runs on its share of the threads, as the caller would.

    Gradients are recorded where the caller records them. With one thread, one task, or inside a task, they run one
    after the other, here.

    Args:
        tasks: functions of no arguments that may run at the same time.
        on_done: called here after each task (a progress bar).

    Raises:
        BaseException: what the first task, in their order, that failed has raised; the others that had begun have
            come to their end, the rest has not begun.
    """
    threads = torch.get_num_threads()
    workers = min(len(tasks), threads)
    if workers <= 1 or getattr(_inside, "task", False):
        return [_then(task(), on_done) for task in tasks]
    pool, grad = _pool(workers, threads // workers), torch.is_grad_enabled()
    failed = threading.Event()
    futures = [pool.submit(_run, task, grad, failed) for task in tasks]
    try:
        _watch(futures, on_done)
    finally:
        for future in futures:
            future.cancel()
        wait(futures)
    # in their order, or else the error of one that had begun
    return [future.result() for future in sorted(futures, key=_never_begun)]


_inside = threading.local()


class _NeverBegun(CancelledError):
    """Says that a task was left out, as another one had failed."""


def _never_begun(future: Future) -> bool:
    return future.cancelled() or isinstance(future.exception(), _NeverBegun)


def _then(result: T, on_done: Callable[[], object]) -> T:
    on_done()
    return result


def _run(task: Callable[[], T], grad: bool, failed: threading.Event) -> T:
    if failed.is_set():
        raise _NeverBegun
    try:
        with torch.set_grad_enabled(grad):
            return task()
    except BaseException:
        failed.set()
        raise


def _watch(futures: Sequence[Future], on_done: Callable[[], object]) -> None:
    """Call `on_done` for each that comes to its end; return when all have, or when one has failed."""
    left = set(futures)
    while left:
        done, left = wait(left, return_when=FIRST_COMPLETED)
        for future in done:
            if future.exception() is not None:
                return
            on_done()


@cache
def _pool(workers: int, threads: int) -> ThreadPoolExecutor:
    """Return the pool of so many workers with so many threads each; it lives as long as the process."""
    begun, before = threading.Barrier(workers + 1), torch.get_num_threads()

    def begin() -> None:
        torch.get_num_threads()  # a thread takes over the number of the process once, when it is first asked
        torch.set_num_threads(threads)
        _inside.task = True
        begun.wait()

    pool = ThreadPoolExecutor(workers, thread_name_prefix="ptq_exp", initializer=begin)
    for _ in range(workers):
        pool.submit(int)
    begun.wait()
    torch.set_num_threads(before)  # else threads that are begun later would have as few
    return pool


if hasattr(os, "register_at_fork"):  # threads are not there in a process that was forked
    os.register_at_fork(after_in_child=_pool.cache_clear)
