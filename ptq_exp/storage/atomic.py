"""Write files so that a killed run leaves either the old file or the new one, never half of one."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from ptq_exp.errors import DataError, PTQError

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it over `path` when the block ends well.

    The temporary file lies in the folder of `path` (a rename is atomic only within one file system), keeps
    its suffix (`numpy` and `PIL` choose by it) and is removed when the block raises. The folder is created.

    Raises:
        PTQError: the disk is full, the folder cannot be written, ...; the message names `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush_to_disk(temporary)
        os.replace(temporary, path)
        _flush_to_disk(path.parent)
    except Exception as error:
        if (reason := _refused(error)) is None:
            raise
        raise PTQError(f"cannot write {path}: {reason}; free space there or choose another folder") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def replacing_folder(out: Path) -> Iterator[Path]:
    """Yield a new folder beside `out`, whose files take the place of all that is in `out` when the block ends well.

    Raises:
        PTQError: the disk is full, the folder cannot be written, ...; the message begins with `out=`.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as name:
            yield Path(name)
            out.mkdir(exist_ok=True)
            for path in out.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            for path in Path(name).iterdir():
                os.replace(path, out / path.name)
    except OSError as error:
        raise PTQError(
            f"cannot write out={out}: {error.strerror or error}; free space there or give another folder"
        ) from error


def share_file(source: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Give a file a second name, or copy it where file systems do not allow that; what is at `path` is replaced.

    Whoever replaces or removes one of both, as everything here does, leaves the other as it is.

    Raises:
        PTQError: there is no such file, or `path` cannot be written.
    """
    with atomic_path(path) as temporary:
        try:
            os.link(source, temporary)
        except OSError:  # another disk, or no such thing there
            shutil.copyfile(source, temporary)


def _refused(error: Exception) -> str | None:
    """Say why the system did not let a file be written; None for an error of another kind.

    Libraries in other languages (safetensors) have errors of their own, with the system's words in the text.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return next((os.strerror(number) for number in _DISK_ERRORS if os.strerror(number) in str(error)), None)


def file_digest(*paths: str | os.PathLike[str]) -> str:
    """Return the SHA-256 (hexadecimal) of one file, or of several one after the other, to identify a checkpoint.

    Raises:
        DataError: a file cannot be read.
    """
    state = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as stream:
                while block := stream.read(1 << 20):
                    state.update(block)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    return state.hexdigest()


def _flush_to_disk(path: Path) -> None:
    """Call fsync on a file, or a folder so that a rename inside it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_npz(path: str | os.PathLike[str], **arrays: np.ndarray) -> None:
    """Write named arrays (no Python objects) as one `.npz` file, atomically.

    Raises:
        PTQError: an array holds Python objects, or the file cannot be written; the message names `path`.
    """
    for name, array in arrays.items():
        if np.asarray(array).dtype.hasobject:
            raise PTQError(f"cannot write {path}: array {name!r} holds Python objects, not numbers or text")
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        np.savez(stream, **arrays)
