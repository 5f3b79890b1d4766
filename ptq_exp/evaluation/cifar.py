"""CIFAR-10 as its authors distribute it for Python: pickled batches, read without running what a pickle may contain."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from ptq_exp.errors import DataError, one_line

FOLDER = "cifar-10-batches-py"
SPLITS = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
_SHAPE = (3, 32, 32)


def cifar10_folder(path: str | os.PathLike) -> Path | None:
    """Return the folder with batches: `path` itself or the folder of the official name in it; None if neither."""
    for folder in (Path(path), Path(path) / FOLDER):
        if any((folder / name).is_file() for names in SPLITS.values() for name in names):
            return folder
    return None


def cifar10_files(folder: Path, split: str) -> Sequence[Path]:
    """Return the batch files of `split` (`train`, `test`).

    Raises:
        DataError: another split, or a file is missing.
    """
    if split not in SPLITS:
        raise DataError(f"split={split}: CIFAR-10 has the splits {' and '.join(SPLITS)}")
    files = [folder / name for name in SPLITS[split]]
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: no such file; unpack cifar-10-python.tar.gz again")
    return files


def read_cifar10(files: Sequence[Path]) -> np.ndarray:
    """Read the images of batch files one after the other, uint8 [N, 32, 32, 3].

    Raises:
        DataError: a file is damaged, is no batch of CIFAR-10, or holds anything but plain values and arrays of bytes.
    """
    planes = np.concatenate([_read_batch(file) for file in files]).reshape(-1, *_SHAPE)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1))


def _read_batch(file: Path) -> np.ndarray:
    """Rows uint8 [n, 3072] of one file: red, green and blue plane of each image."""
    try:
        with open(file, "rb") as stream:
            batch = _ArrayUnpickler(stream, encoding="bytes").load()  # written by Python 2: str is bytes
    except Exception as error:  # an unpickler raises nearly anything on a foreign or damaged file
        raise DataError(f"{file} is no readable batch of CIFAR-10: {one_line(error)}") from error
    data = batch.get(b"data", batch.get("data")) if isinstance(batch, dict) else None
    rows = data.array if isinstance(data, _Array) else None
    if rows is None or rows.ndim != 2 or rows.shape[1] != np.prod(_SHAPE):
        found = "no array" if rows is None else f"shape {rows.shape}"
        raise DataError(f"{file} is no batch of CIFAR-10: expected 'data' uint8 [n, 3072], found {found}")
    return rows


class _Array:
    """Stands for an array while it is unpickled: takes the pickled state of a numpy array of uint8 and nothing else."""

    array: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran_order, content = state
        if not isinstance(dtype, _Dtype) or dtype.name not in ("u1", b"u1"):
            raise pickle.UnpicklingError("an array of another type than uint8")
        self.array = np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran_order else "C")


class _Dtype:
    """Stands for a numpy data type: keeps its name alone."""

    def __init__(self, name: str | bytes, *_: object) -> None:
        self.name = name

    def __setstate__(self, state: tuple) -> None:
        """Byte order and fields, which uint8 does not have."""


def _encode(text: str, encoding: str) -> bytes:
    """How protocol 2 of Python 3 writes bytes."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding}")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Plain values and uint8 arrays: every other name in the file is refused before it is imported or called."""

    # stand-ins of ours for numpy's names: not even numpy's own constructors run on what the file says
    _NAMES: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
        ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> object:
        try:
            return self._NAMES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which no image needs") from None
