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
from contextlib import suppress
from contextvars import copy_context
from functools import cache, partial
from typing import NamedTuple, TypeVar

import torch
from torch.utils import _python_dispatch

T = TypeVar("T")


def side_by_side(tasks: Sequence[Callable[[], T]], on_done: Callable[[], object] = lambda: None) -> list[T]:
    """Return the results of `tasks`, in their order; each runs on its share of the threads, as the caller would.

    That is with the caller's gradients, inference mode, autocast on the CPU and context variables. With one thread, one
    task, inside a task, where torch watches this thread alone (modes, a profiler), and where no thread can be begun
    (any more), they run one after the other, here.

    Args:
        tasks: functions of no arguments that may run at the same time.
        on_done: called here after each task (a progress bar).

    Raises:
        BaseException: what the first task, in their order, that failed has raised; the others that had begun have
            come to their end, the rest has not begun.
    """
    threads = torch.get_num_threads()
    workers = min(len(tasks), threads)
    alone = workers <= 1 or getattr(_inside, "task", False) or _watched()
    pool = None if alone else _begun_pool(workers, threads // workers)
    if pool is None:
        return [_then(task(), on_done) for task in tasks]
    caller, failed = _Caller.here(), threading.Event()
    futures = [_submitted(pool, partial(_run, task, caller, failed)) for task in tasks]
    try:
        _watch(futures, on_done)
    finally:
        for future in futures:
            future.cancel()
        wait(futures)
    # in their order, or else the error of one that had begun
    return [future.result() for future in sorted(futures, key=_never_begun)]


_inside = threading.local()
# none of them is documented: of a torch that has them no longer nothing is asked
_WATCHERS: tuple[Callable[[], object], ...] = (
    getattr(torch.overrides, "_get_current_function_mode_stack", tuple),
    getattr(_python_dispatch, "_get_current_dispatch_mode_stack", tuple),
    getattr(getattr(torch._C, "_autograd", None), "_profiler_enabled", bool),
)


class _NeverBegun(CancelledError):
    """Says that a task was left out, as another one had failed."""


def _never_begun(future: Future) -> bool:
    return future.cancelled() or isinstance(future.exception(), _NeverBegun)


def _then(result: T, on_done: Callable[[], object]) -> T:
    on_done()
    return result


class _Caller(NamedTuple):
    """What torch keeps for each thread apart."""

    grad: bool
    inference: bool
    autocast: bool
    autocast_type: torch.dtype
    autocast_cache: bool

    @classmethod
    def here(cls) -> _Caller:
        return cls(
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled(),
        )

    def call(self, task: Callable[[], T]) -> T:
        """Call `task` as it would be called there."""
        with (
            torch.inference_mode(self.inference), torch.set_grad_enabled(self.grad),
            torch.autocast("cpu", self.autocast_type, self.autocast, self.autocast_cache),
        ):
            return task()


def _watched() -> bool:
    """Say whether something is told of, or changes, the operations of this thread and of no other."""
    return any(bool(ask()) for ask in _WATCHERS)


def _run(task: Callable[[], T], caller: _Caller, failed: threading.Event) -> T:
    if failed.is_set():
        raise _NeverBegun
    try:
        return caller.call(task)
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


def _submitted(pool: ThreadPoolExecutor, task: Callable[[], T]) -> Future[T]:
    try:
        return pool.submit(copy_context().run, task)
    except RuntimeError:  # the interpreter has come to its end, while a thread of the user goes on
        ended: Future[T] = Future()
        try:
            ended.set_result(task())
        except BaseException as error:
            ended.set_exception(error)
        return ended


def _begun_pool(workers: int, threads: int) -> ThreadPoolExecutor | None:
    """Return the pool; None where no threads can be begun: there are too many, or the interpreter ends."""
    try:
        return _pool(workers, threads)
    except RuntimeError:
        return None


@cache
def _pool(workers: int, threads: int) -> ThreadPoolExecutor:
    """Return the pool of so many workers with so many threads each; it lives as long as the process."""
    begun, before = threading.Barrier(workers + 1), torch.get_num_threads()

    def begin() -> None:
        torch.get_num_threads()  # a thread takes over the number of the process once, when it is first asked
        torch.set_num_threads(threads)
        _inside.task = True
        with suppress(threading.BrokenBarrierError):
            begun.wait()

    pool = ThreadPoolExecutor(workers, thread_name_prefix="ptq_exp", initializer=begin)
    try:
        for _ in range(workers):
            pool.submit(int)
        begun.wait()
    except BaseException:
        begun.abort()  # else those that were begun would wait for the others for ever
        pool.shutdown(cancel_futures=True)
        raise
    finally:
        torch.set_num_threads(before)  # else threads that are begun later would have as few
    return pool


if hasattr(os, "register_at_fork"):  # threads are not there in a process that was forked
    os.register_at_fork(after_in_child=_pool.cache_clear)
