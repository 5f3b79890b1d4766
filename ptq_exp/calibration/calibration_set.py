"""`CalibrationSet`: paired states, times and labels on which quantizer ranges are chosen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ptq_exp.diffusion.guidance import both_halves
from ptq_exp.errors import DataError
from ptq_exp.storage.atomic import write_npz
from ptq_exp.storage.finite import is_finite
from ptq_exp.storage.npz import npz_arrays, require_arrays
from ptq_exp.storage.pieces import slices


@dataclass(frozen=True)
class CalibrationSet:
    """Calibration samples in the order of their sample index; arrays may be memory-mapped.

    Attributes:
        x: float32 [N, C, H, W], the state that enters the step.
        step: int64 [N], the position in the `TimeGrid` (0 = noisiest).
        t: float32 [N], the network time that the state is shown with: that of the step (see `labelled`).
        evaluations: int64 [N], network evaluations spent on each.
        y: int64 [N] labels, or None for an unconditional model.
        null_label: with guidance, the label of "no class": each state is then seen with its own label and without.
    """

    x: np.ndarray
    step: np.ndarray
    t: np.ndarray
    evaluations: np.ndarray
    y: np.ndarray | None = None
    null_label: int | None = None

    def __post_init__(self) -> None:
        if len(self.x) == 0:
            raise DataError("the calibration set is empty: calibration.n_samples must be at least 1")
        lengths = {key: len(value) for key, value in self._arrays().items()}
        if len(set(lengths.values())) != 1:
            raise DataError(f"calibration set: {', '.join(f'{n} {key}' for key, n in lengths.items())}")
        if not is_finite(self.x):
            raise DataError("the calibration set holds NaN or infinity: check model.checkpoint and the sampler")
        if not is_finite(np.asarray(self.t)):
            raise DataError("the calibration set holds NaN or infinity in its times: collect it again")
        if np.min(self.step) < 0:
            raise DataError(f"the calibration set has the step {np.min(self.step)}; the first is 0")

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """(x, t, y) of at most `batch_size` states, every state once; with guidance, both halves of each batch."""
        for rows in slices(len(self), batch_size):
            x, t = (torch.from_numpy(np.array(part[rows])) for part in (self.x, self.t))
            y = None if self.y is None else torch.from_numpy(np.array(self.y[rows]))
            yield (x, t, y) if self.null_label is None else both_halves(x, t, y, self.null_label)

    def batch_steps(self, batch_size: int) -> Tensor:
        """The sampling step of each state that `batches` yields, int64 [N] in its order; with guidance [2 N]."""
        steps = torch.from_numpy(np.array(self.step))
        if self.null_label is None:
            return steps
        return torch.cat([half for rows in slices(len(self), batch_size) for half in (steps[rows], steps[rows])])

    def take(self, rows: np.ndarray) -> CalibrationSet:
        """The states number `rows`, int64 [M], in that order."""
        return CalibrationSet(**{key: np.array(part[rows]) for key, part in self._arrays().items()},
                              null_label=self.null_label)  # fmt: skip

    def save(self, path: Path) -> None:
        """Write as an uncompressed `.npz` file, atomically."""
        extra = {} if self.null_label is None else {"null_label": np.array(self.null_label)}
        write_npz(path, **self._arrays(), **extra)

    @classmethod
    def load(cls, path: Path) -> CalibrationSet:
        """Read what `save` wrote; states stay on disk until they are used.

        Raises:
            DataError: the file is missing, truncated, or holds something else.
        """
        arrays = npz_arrays(path)
        null_label = arrays.pop("null_label", None)
        if "x" not in arrays:
            raise DataError(f"{path} is no calibration set: it holds {', '.join(arrays)}")
        require_arrays(path, arrays, {"x": ("f", 4), "step": ("iu", 1), "t": ("f", 1), "evaluations": ("iu", 1)})
        try:
            return cls(**arrays, null_label=None if null_label is None else int(null_label))
        except TypeError as error:
            raise DataError(f"{path} is no calibration set: it holds {', '.join(arrays)}") from error
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays = {"x": self.x, "step": self.step, "t": self.t, "evaluations": self.evaluations, "y": self.y}
        return {key: value for key, value in arrays.items() if value is not None}
