"""Read `.npz` files, foreign ones too: their names, their arrays, and large arrays without loading them."""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from numpy.lib import format as npy

from ptq_exp.errors import DataError, PTQError, one_line

# RuntimeError: a damaged directory of the archive claims encryption or an unknown version
_UNREADABLE = (OSError, KeyError, EOFError, ValueError, RuntimeError, struct.error, zipfile.BadZipFile, zlib.error)
_HEADER_READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_LOCAL_HEADER = 30  # bytes before the member's name; its last two fields are the lengths of the name and of the rest


@contextmanager
def open_npz(path: str | os.PathLike[str], what: str = ".npz file") -> Iterator[np.lib.npyio.NpzFile]:
    """Open the archive at `path`, never unpickled; `what` names the expected content in the message.

    Raises:
        DataError: missing, damaged or not an archive, or the block reads an array that is not there.
    """
    try:
        with open(path, "rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path} is no {what}: it holds one array without a name")
            with archive:
                for info in _members(archive).infolist():
                    _check_size(path, _members(archive), info)
                yield archive
    except PTQError:  # also a ValueError, and clear already
        raise
    except _UNREADABLE as error:
        raise DataError(f"{path} is no readable {what}: {one_line(error)}") from error


def npz_keys(path: str | os.PathLike[str]) -> list[str]:
    """List the names of the arrays in an `.npz` file.

    Raises:
        DataError: as `open_npz`.
    """
    with open_npz(path) as archive:
        return list(archive.files)


def npz_array(path: str | os.PathLike[str], key: str) -> np.ndarray:
    """Read one array; mapped read-only where it is stored uncompressed (as `numpy.savez` does), else loaded.

    Mapped or not, the file is read once in full to compare its checksum.

    Raises:
        DataError: as `open_npz`, or no such array; the message names those that were found.
    """
    with open_npz(path) as archive:
        if key not in archive.files:
            raise DataError(f"{path}: found the arrays {', '.join(archive.files) or '(none)'}; expected {key}")
        return _read(path, archive, key)


def npz_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read all arrays, each as `npz_array` gives it.

    Raises:
        DataError: as `open_npz`.
    """
    with open_npz(path) as archive:
        return {key: _read(path, archive, key) for key in archive.files}


def require_arrays(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], expected: Mapping[str, tuple[str, int]]
) -> None:
    """Raise unless `arrays`, read from `path`, are what a file of its kind holds.

    Args:
        expected: name -> (kinds of number as in `numpy.dtype.kind`, number of dimensions).

    Raises:
        DataError: one is missing, or of another type or number of dimensions.
    """
    for name, (kinds, dimensions) in expected.items():
        if name not in arrays:
            found = ", ".join(arrays) or "(none)"
            raise DataError(f"{path}: found the arrays {found}; expected {', '.join(expected)}")
        array = arrays[name]
        if array.dtype.kind not in kinds or array.ndim != dimensions:
            raise DataError(f"{path}: {name} is {array.dtype} of shape {array.shape}, which is not what belongs there")


def _members(archive: np.lib.npyio.NpzFile) -> zipfile.ZipFile:
    """Return the archive behind numpy's reader, which has one as long as it is open."""
    assert archive.zip is not None
    return archive.zip


def _check_size(path: str | os.PathLike[str], archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    """Raise DataError for a header that promises more or less than there is, before memory is taken for it."""
    if not info.filename.endswith(".npy"):
        return
    with archive.open(info) as stream:
        read_header = _HEADER_READERS.get(npy.read_magic(stream))
        if read_header is None:
            return
        shape, _, dtype = read_header(stream)
        promised, there = math.prod(shape) * dtype.itemsize, info.file_size - stream.tell()
    if not dtype.hasobject and (min(shape, default=0) < 0 or promised != there):
        raise DataError(f"{path}: {info.filename} promises {promised} bytes of numbers, but has {there}")


def _read(path: str | os.PathLike[str], archive: np.lib.npyio.NpzFile, key: str) -> np.ndarray:
    """Read one array, mapped where it can be; its checksum is compared either way."""
    mapped = _map(path, _members(archive), f"{key}.npy")
    if mapped is None:
        return archive[key]
    _check_sum(_members(archive), f"{key}.npy")
    return mapped


def _check_sum(archive: zipfile.ZipFile, member: str) -> None:
    """Raise BadZipFile if the member is not what was written."""
    with archive.open(member) as stream:
        while stream.read(1 << 20):
            pass


def _map(path: str | os.PathLike[str], archive: zipfile.ZipFile, member: str) -> np.ndarray | None:
    """Map an uncompressed array of numbers into memory; None where it cannot be mapped."""
    info = archive.NameToInfo.get(member)
    if info is None or info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        return None
    with open(path, "rb") as stream:
        stream.seek(info.header_offset)
        name, extra = struct.unpack("<26xHH", stream.read(_LOCAL_HEADER))
        stream.seek(name + extra, os.SEEK_CUR)
        read_header = _HEADER_READERS.get(npy.read_magic(stream))
        if read_header is None:
            return None
        shape, fortran_order, dtype = read_header(stream)
        if dtype.hasobject or 0 in shape:  # an empty file region cannot be mapped
            return None
        return np.memmap(path, dtype, "r", stream.tell(), shape, "F" if fortran_order else "C")
