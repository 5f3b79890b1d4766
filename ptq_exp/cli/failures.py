"""What the machine refuses (disk, folder, memory) in one line that names the place and the setting to change."""

from __future__ import annotations

import errno
from pathlib import Path

from ptq_exp.errors import one_line

GATE_MISSED = 3
"""Exit status of a command whose runs finished, where the scores of one miss evaluation.gate."""
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EIO}
_MEMORY = ("can't allocate memory", "out of memory", "not enough memory", "Unable to allocate")


def refusal(error: BaseException, folder: str) -> str | None:
    """Describe in a line an error of a run in `folder` that the machine is to blame for; None for others."""
    text = one_line(error, 160)
    if isinstance(error, OSError) and error.errno in _DISK:
        return cannot_write(error, folder)
    named = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    if named or (isinstance(error, RuntimeError) and any(words in text for words in _MEMORY)):
        return (
            f"out of memory ({text}): lower batch_size of evaluation, calibration, "
            "correction or reconstruction, or reconstruction.cache_gb"
        )
    return None


def cannot_write(error: OSError, folder: str) -> str:
    """Describe in a line what cannot be made or written; it is in `folder`, if the error does not say where."""
    place = error.filename or f"to {folder}"
    if error.filename and Path(error.filename) in Path(folder).parents:
        place = folder  # what was asked for, not the part of its path where it ended
    return (
        f"cannot write {place}: {error.strerror or error}; free space there, or choose another folder: "
        "hydra.run.dir=PATH for the run, cache_dir=PATH for what runs share"
    )
