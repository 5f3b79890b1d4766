"""Opening real images, whatever they are stored as, and checking that they fit the model."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ptq_exp.errors import DataError
from ptq_exp.evaluation.cifar import cifar10_files, cifar10_folder, read_cifar10
from ptq_exp.evaluation.image_source import ArrayImages, FolderImages, ImageSource
from ptq_exp.storage.atomic import file_digest
from ptq_exp.storage.finite import extremes
from ptq_exp.storage.npz import npz_array

NPZ_IMAGES = "arr_0"
"""Name of the images in an `.npz` file of the ADM evaluator, and in our own `samples.npz`."""

_KINDS = "a folder of images, an .npz file with arr_0, or the unpacked folder of CIFAR-10"


def open_images(
    path: str | os.PathLike,
    *,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    split: str = "train",
) -> ImageSource:
    """Real images at `path`; pixels are read when the source is sliced, and never resized.

    Args:
        path: a folder of png, jpg, jpeg, webp or bmp files (with subfolders); an `.npz` file whose `arr_0` is
            uint8 [N, H, W, 1 or 3], memory-mapped if it is not compressed; or `cifar-10-batches-py` or the folder
            that holds it.
        size: the side that the model expects, or (height, width); None = any.
        channels: 1 or 3; None = as stored. Grey image *files* are repeated to three channels, see `FolderImages`.
        split: `train` or `test` of CIFAR-10; the other kinds have no splits.

    Raises:
        DataError: nothing there, nothing to read, a damaged file, or another size or number of channels than expected;
            the message names the first such file.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; expected {_KINDS}")
    if path.is_dir() and (folder := cifar10_folder(path)):
        files = cifar10_files(folder, split)
        return _checked(ArrayImages(read_cifar10(files), lambda: file_digest(*files)), folder, size, channels)
    if path.is_dir():
        folder_images = FolderImages(path, channels)
        return _checked(folder_images, folder_images.files[0], size, channels)
    if path.suffix.lower() != ".npz":
        raise DataError(f"{path}: expected {_KINDS}; unpack an archive first")
    return _checked(ArrayImages(_npz_images(path), lambda: file_digest(path)), path, size, channels)


def content_digest(path: str | os.PathLike, *, split: str = "train") -> str:
    """SHA-256 of a file, or of the images in a folder: keys what is computed from `path`, also from stored statistics.

    Raises:
        DataError: as `open_images`.
    """
    path = Path(path)
    return file_digest(path) if path.is_file() else open_images(path, split=split).digest


def _npz_images(path: Path) -> np.ndarray:
    images = npz_array(path, NPZ_IMAGES)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise DataError(
            f"{path}: {NPZ_IMAGES} is {images.dtype} of shape {images.shape}{_range(images)}; expected images uint8 "
            "[N, H, W, 1 or 3], black 0 and white 255: convert them first"
        )
    return images


def _range(images: np.ndarray) -> str:
    """Return what numbers an array of another type holds: it tells how to convert them."""
    if images.size == 0 or images.dtype.kind not in "fiu" or images.dtype == np.uint8:
        return ""
    low, high = extremes(images) or (images.min(), images.max())
    return f" with values {low:g} to {high:g}"


def _checked(source: ImageSource, file: Path, size: int | tuple[int, int] | None, channels: int | None) -> ImageSource:
    """`source`, if it has the size and channels that the model expects; `file` is named if not."""
    _, height, width, found = source.shape
    expected = (size, size) if isinstance(size, int) else size
    if expected is not None and (height, width) != tuple(expected):
        wanted = f"{expected[1]}x{expected[0]}"
        raise DataError(f"{file} is {width}x{height}, the model expects {wanted}; resize the images to {wanted} first")
    if channels is not None and found != channels:
        raise DataError(f"{file} has {found} channel(s), the model expects {channels}; convert the images first")
    return source
