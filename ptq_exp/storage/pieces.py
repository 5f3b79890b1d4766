"""Long computations in pieces on disk: each piece is written when it is ready, a killed run continues with the rest.

Nothing here holds more than one piece in memory, so that a set of images or features may be larger than it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ptq_exp.errors import DataError
from ptq_exp.storage.atomic import atomic_path, write_npz
from ptq_exp.storage.npz import open_npz

JOINED = "joined.npz"
"""All pieces in one file, in their folder."""


class Parts:
    """A folder with one `.npz` file per piece; piece `start` holds rows start, start + 1, ... of each array.

    Args:
        folder: must belong to this computation alone; created when the first piece is written.
        starts: first row of each piece, ascending.
        n: rows in all; what the last piece holds beyond is cut.
        names: of the arrays that every piece holds.
        totals: of further arrays of every piece, without rows: those of all pieces are added up, in their order.
    """

    def __init__(
        self, folder: Path, starts: Sequence[int], n: int, names: Sequence[str], totals: Sequence[str] = ()
    ) -> None:
        self.folder, self.starts, self.n, self.names = folder, list(starts), n, tuple(names)
        self.totals = tuple(totals)

    def path(self, start: int) -> Path:
        """Return the file of the piece whose first row is `start`."""
        return self.folder / f"{start:08d}.npz"

    def missing(self) -> list[int]:
        """Return the starts of the pieces that are not there yet."""
        return [start for start in self.starts if not self.path(start).exists()]

    def write(self, start: int, **arrays: np.ndarray) -> None:
        """Write one piece, atomically; each array [rows, ...], but for the totals."""
        write_npz(self.path(start), **arrays)

    def join(self, path: Path, **extra: np.ndarray) -> bool:
        """Write all pieces as one uncompressed `.npz` file with arrays [n, ...], and the `extra` arrays beside them.

        Returns:
            False if a piece was missing or damaged (it is removed then): make it and call again.
        """
        if self.missing():
            return False
        try:
            with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
                for name in self.names:
                    self._join_array(archive, name)
                for name, array in (extra | {name: self._total(name) for name in self.totals}).items():
                    with archive.open(f"{name}.npy", "w") as stream:
                        np.lib.format.write_array(stream, np.asarray(array), allow_pickle=False)
        except DataError:  # of a piece; what cannot be written is another error
            return False
        return True

    def _join_array(self, archive: zipfile.ZipFile, name: str) -> None:
        first = self._read(self.starts[0], name)
        header = {
            "descr": np.lib.format.dtype_to_descr(first.dtype),
            "fortran_order": False,
            "shape": (self.n, *first.shape[1:]),
        }
        with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for start in self.starts:
                stream.write(np.ascontiguousarray(self._read(start, name)[: self.n - start]).data)

    def _total(self, name: str) -> np.ndarray:
        total = self._read(self.starts[0], name)
        for start in self.starts[1:]:
            total = total + self._read(start, name)
        return total

    def _read(self, start: int, name: str) -> np.ndarray:
        try:
            with open_npz(self.path(start)) as archive:
                return archive[name]
        except DataError:
            self.path(start).unlink(missing_ok=True)
            raise


def slices(n: int, size: int) -> Iterator[slice]:
    """Return consecutive slices of at most `size` rows over 0..n-1."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))
