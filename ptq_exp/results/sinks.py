"""What is recorded of a run beside its results: nothing that goes wrong there spoils them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_log = logging.getLogger("ptq_exp")


@contextmanager
def spoils_nothing(what: str, instead: str) -> Iterator[None]:
    """Turn an error of the block into a warning of one line: `what` is missing, why, and how to get it."""
    try:
        yield
    except Exception as error:
        _log.warning("%s was not made (%s); %s", what, reason(error), instead)


def reason(error: BaseException) -> str:
    """Return an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def within(seconds: float, function: Callable[[], object]) -> None:
    """Call `function`, but wait no longer than this; what it hangs on does not hold the process up at its end.

    Raises:
        TimeoutError: it has not returned in time.
        Exception: what it raised.
    """
    raised: list[BaseException] = []

    def call() -> None:
        try:
            function()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:g} s")
    if raised:
        raise raised[0]
