"""Errors that a user can mend: the message says what was found, what was expected and which setting to change."""

from __future__ import annotations

import codecs
import difflib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

READER_GONE = 141
"""Exit status of a command whose output nobody reads any more: 128 + SIGPIPE, as shells show it."""


class PTQError(ValueError):
    """Root of the errors that end a run in one clear line instead of a traceback."""


class ConfigError(PTQError):
    """A setting is misspelt, impossible, or contradicts another one."""


class InfeasibleError(PTQError):
    """A configuration exceeds a limit that was set for it: nothing was computed, and nothing is wrong."""


class CheckpointError(PTQError):
    """A checkpoint file is missing, truncated, or belongs to another architecture."""


class DataError(PTQError):
    """Input data is missing, of the wrong shape, or holds NaN or infinity."""


class QuantizationError(PTQError):
    """A quantizer cannot be placed, calibrated or run."""


@contextmanager
def naming(where: str, unless: str | None = None) -> Iterator[None]:
    """Put `where` before an error about data inside: its setting or file; not before one whose text holds `unless`."""
    try:
        yield
    except DataError as error:
        if unless is not None and unless in str(error):
            raise
        raise DataError(f"{where}{error}") from error


def one_line(error: object, limit: int = 200) -> str:
    """Return the text of an error, or of another object, as one line of at most `limit` characters; never empty."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def nearest(word: str, valid: Iterable[str], n: int = 1) -> str:
    """Return `did you mean 'x'?` with the `n` nearest of `valid`; else the valid words, or how to see them."""
    known = sorted(valid)
    if near := difflib.get_close_matches(word, known, n):
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"valid: {', '.join(known)}" if len(known) < 40 else "python -m ptq_exp --help lists what there is"


def not_installed(who: str, package: str, extra: str) -> ConfigError:
    """Return the error of a choice `who` that needs a `package` of one of our extras, which is not there."""
    return ConfigError(
        f"{who} needs {package}, which is not installed: pip install 'ptq-exp[{extra}]' "
        f"(in a checkout: pip install -e '.[{extra}]')"
    )


class Interrupted(BaseException):
    """Ctrl-C (SIGINT), or SIGTERM, as schedulers send it.

    No `KeyboardInterrupt`: Lightning answers that with exit(1), while it lets any other exception through.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    def __str__(self) -> str:
        name = signal.Signals(self.signum).name
        return f"interrupted by {name}{' (Ctrl-C)' if self.signum == signal.SIGINT else ''}"

    @property
    def status(self) -> int:
        """Exit status as shells show it: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signum


_SAME_EVENT = 0.5  # seconds: a terminal sends Ctrl-C to all processes of a command, of which one may pass it on
_DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM inside into `Interrupted`; a later one kills the process.

    A signal that somebody handles or ignores already stays as it is. Python delivers signals to the main thread alone:
    in another one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _DEFAULTS}
    since: float | None = None

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal since
        if since is not None and time.monotonic() - since < _SAME_EVENT:
            return
        if since is not None:  # resetting the handlers at the first one would not do: Lightning puts back ours
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        since = time.monotonic()
        raise Interrupted(number)

    ours = [number for number, default in _DEFAULTS.items() if before[number] is default]
    for number in ours:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])


def interruption(error: BaseException | None) -> str | None:
    """Say what interrupted the run that ended in `error`; None for any other end."""
    if isinstance(error, Interrupted):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted by SIGINT (Ctrl-C)"
    # Lightning's answer to a KeyboardInterrupt, in programs that do not start from our command
    return interruption(error.__context__) if isinstance(error, SystemExit) else None


def end_interrupted(error: Interrupted, how_to_go_on: str) -> NoReturn:
    """End the command: one line that says how to go on, and the exit status that shells know."""
    from multiprocessing import active_children

    for process in active_children():  # the interpreter would wait until they have done all
        process.terminate()
    print(f"\ninterrupted: {how_to_go_on}", file=sys.stderr)
    sys.exit(error.status)


AGAIN = "the same command goes on where it stopped"


@contextmanager
def command_line(how_to_go_on: str = "give the same command again") -> Iterator[None]:
    """Around a command, what ends it in one line on standard error.

    A `PTQError` gives status 1, an interruption says `how_to_go_on`, and a closed pipe is a quiet end.
    """
    start_command()
    try:
        with interruptible():
            yield
            sys.stdout.flush()
    except PTQError as error:
        sys.exit(f"error: {error}")
    except Interrupted as error:
        end_interrupted(error, how_to_go_on)
    except BrokenPipeError:
        reader_gone()


def start_command() -> None:
    """Make the process of a command independent of where it was started.

    Standard output and error replace what their encoding lacks (no result is lost for an arrow in its table), or lead
    nowhere where they are closed. Pictures go to files, whatever a notebook has set for its own. Names of files are
    UTF-8 in every locale: in another one, the process starts anew in Python's UTF-8 mode.
    """
    if codecs.lookup(sys.getfilesystemencoding()).name != "utf-8" and not sys.flags.utf8_mode:
        if sys.stdout is not None:
            os.environ.setdefault("PYTHONIOENCODING", f"{sys.stdout.encoding}:replace")
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    os.environ["MPLBACKEND"] = "agg"
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def reader_gone() -> NoReturn:
    """End quietly: whoever read the output, `head` for instance, has what it wanted."""
    # what is still buffered must go somewhere when the interpreter ends
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(READER_GONE)
