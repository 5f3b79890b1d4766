"""Errors that a user can mend: the message says what was found, what was expected and which setting to change."""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
def command_line() -> Iterator[None]:
    """Around a command: a `PTQError` becomes one line on standard error and status 1, a closed pipe a quiet end."""
    start_command()
    try:
        yield
        sys.stdout.flush()
    except PTQError as error:
        sys.exit(f"error: {error}")
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
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  for the life of the process
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def reader_gone() -> NoReturn:
    """End quietly: whoever read the output, `head` for instance, has what it wanted."""
    # what is still buffered must go somewhere when the interpreter ends
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(READER_GONE)
