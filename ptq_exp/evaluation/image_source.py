"""Real images that are read when they are asked for: an array (in memory or mapped from a file) or a folder."""

from __future__ import annotations

import hashlib
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from ptq_exp.errors import DataError, one_line
from ptq_exp.storage.atomic import file_digest

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")

# Channels of the PIL modes that an 8-bit image can have without a choice of how to convert it. CMYK, YCbCr, 16-bit
# and float modes are left out: their conversion is the user's decision.
_CHANNELS = {"1": 1, "L": 1, "LA": 1, "P": 3, "RGB": 3, "RGBA": 3}
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class ImageSource(ABC):
    """N images of one size. A slice or an array of indices reads those images alone: uint8 [n, H, W, C].

    Attributes:
        shape: (N, H, W, C), known without reading the images.
        dtype: uint8.
    """

    shape: tuple[int, int, int, int]
    dtype = np.dtype(np.uint8)

    def __len__(self) -> int:
        return self.shape[0]

    @abstractmethod
    def __getitem__(self, key: slice | np.ndarray) -> np.ndarray: ...

    @property
    @abstractmethod
    def digest(self) -> str:
        """SHA-256 of the content, so that what is computed from these images can be cached under it."""

    def take(self, n: int | None) -> ImageSource:
        """`n` images evenly spaced over the order of the source: one sorted by class keeps its mixture.

        All of them if `n` is None or not smaller than N.

        Raises:
            DataError: n < 1.
        """
        if n is not None and n < 1:
            raise DataError(f"at least 1 image is needed, {n} were asked for")
        if n is None or n >= len(self):
            return self
        return _Selection(self, np.arange(n) * len(self) // n)


class _Selection(ImageSource):
    """The images of `source` at `indices`."""

    def __init__(self, source: ImageSource, indices: np.ndarray) -> None:
        self._source, self._indices = source, indices
        self.shape = (len(indices), *source.shape[1:])

    def __getitem__(self, key: slice | np.ndarray) -> np.ndarray:
        return self._source[self._indices[key]]

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self._source.digest} {self._indices.tolist()}".encode()).hexdigest()


class ArrayImages(ImageSource):
    """Images of an array uint8 [N, H, W, C], which may be a memory map.

    Args:
        images: the array.
        digest: computes the digest when it is first asked for.
    """

    def __init__(self, images: np.ndarray, digest: Callable[[], str]) -> None:
        self._images, self._digest = images, digest
        self.shape = images.shape

    def __getitem__(self, key: slice | np.ndarray) -> np.ndarray:
        return np.array(self._images[key])  # a copy: what is returned never keeps a file open

    @cached_property
    def digest(self) -> str:
        return self._digest()


class FolderImages(ImageSource):
    """The images below a folder, in the order of their sorted relative names; nothing is resized.

    The headers of all files are read at once, so that a wrong file is found before any work is done; pixels are read
    when they are asked for. Grey files (PIL modes `1`, `L`) become three equal channels where three are
    asked for or other files have them; palettes become RGB; an alpha channel is dropped if it is opaque everywhere.
    Hidden files and folders and files of other suffixes are passed over.

    Args:
        folder: searched with its subfolders for png, jpg, jpeg, webp and bmp.
        channels: 1 or 3; None = 1 if all files are grey, else 3.

    Raises:
        DataError: no images, images of several sizes, a colour image where channels = 1, a mode other than 8-bit grey,
            RGB or palette; while reading also a damaged file or a transparent pixel. The message names the file.
    """

    def __init__(self, folder: str | os.PathLike, channels: int | None = None) -> None:
        self.folder = Path(folder)
        self.files = _image_files(self.folder)
        if not self.files:
            raise DataError(f"{folder}: found no images; expected files with the suffixes {', '.join(IMAGE_SUFFIXES)}")
        headers = [_header(file) for file in self.files]
        width, height = headers[0][0]
        for file, (size, found) in zip(self.files, headers, strict=True):
            if size != (width, height):
                raise DataError(
                    f"{file} is {size[0]}x{size[1]}, but {self.files[0].name} is {width}x{height}; "
                    "resize the images of the folder to one size first"
                )
            if channels == 1 and found != 1:
                raise DataError(f"{file} has 3 channels, expected 1; convert the images to grey first")
        self.shape = (len(headers), height, width, channels or max(found for _, found in headers))

    def __getitem__(self, key: slice | np.ndarray) -> np.ndarray:
        chosen = np.arange(len(self))[key]
        images = np.empty((len(chosen), *self.shape[1:]), np.uint8)
        for image, index in zip(images, chosen, strict=True):
            image[:] = self._read(self.files[index])
        return images

    @cached_property
    def digest(self) -> str:
        content = hashlib.sha256()
        for file in self.files:
            content.update(f"{file.relative_to(self.folder).as_posix()}\0{file_digest(file)}\n".encode())
        return content.hexdigest()

    def _read(self, file: Path) -> np.ndarray:
        """Pixels uint8 [H, W, 1], or [H, W, 3] where three channels are wanted."""
        try:
            with Image.open(file) as opened:
                image = opened.convert("RGBA") if opened.has_transparency_data else opened
                opaque = image is opened or image.getchannel("A").getextrema()[0] == 255
                pixels = np.asarray(image.convert("L" if self.shape[3] == 1 else "RGB"))
        except _UNREADABLE as error:
            raise DataError(f"{file} cannot be read as an image: {one_line(error)}") from error
        if not opaque:
            raise DataError(f"{file} has transparent pixels; flatten it onto a background first")
        return pixels.reshape(self.shape[1:])


def _image_files(folder: Path) -> Sequence[Path]:
    def is_image(file: Path) -> bool:
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        return file.suffix.lower() in IMAGE_SUFFIXES and not hidden and file.is_file()

    return sorted(filter(is_image, folder.rglob("*")), key=lambda file: file.relative_to(folder).as_posix())


def _header(file: Path) -> tuple[tuple[int, int], int]:
    """(width, height) and the number of channels of an image, without its pixels."""
    try:
        with Image.open(file) as image:
            size, mode = image.size, image.mode
    except _UNREADABLE as error:
        raise DataError(f"{file} cannot be read as an image: {one_line(error)}") from error
    if mode not in _CHANNELS:
        raise DataError(f"{file} has the mode {mode}; convert it to 8-bit grey or RGB first")
    return size, _CHANNELS[mode]
