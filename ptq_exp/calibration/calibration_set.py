"""`CalibrationSet`: the calls on which quantizer ranges are chosen, each with its position in the sampling grid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ptq_exp.diffusion.call import Call
from ptq_exp.diffusion.guidance import both_halves
from ptq_exp.errors import DataError, naming
from ptq_exp.storage.atomic import write_npz
from ptq_exp.storage.finite import is_finite
from ptq_exp.storage.npz import npz_arrays, require_arrays
from ptq_exp.storage.pieces import slices

FORMAT = 2
"""Of the file; 1 = labels alone."""
_OWN = ("x", "step", "t", "evaluations")
_CONDITION, _WITHOUT = "condition.", "unconditional."


@dataclass(frozen=True)
class CalibrationSet:
    """Calibration samples in the order of their sample index; arrays may be memory-mapped.

    Attributes:
        x: float32 [N, ...], such as [N, C, H, W]: the state that enters the step.
        step: int64 [N], the position in the `TimeGrid` (0 = noisiest).
        t: float32 [N], the network time that the state is shown with: that of the step (see `labelled`).
        evaluations: int64 [N], network evaluations spent on each.
        conditions: {argument name: array [N, ...]}, such as int64 labels `y`; {} for an unconditional model.
        unconditional: with guidance, {argument name: what a sample without the condition has}: each state is then seen
            with its conditions and without. {} = no guidance.
    """

    x: np.ndarray
    step: np.ndarray
    t: np.ndarray
    evaluations: np.ndarray
    conditions: Mapping[str, np.ndarray] = field(default_factory=dict)
    unconditional: Mapping[str, np.ndarray] = field(default_factory=dict)

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
        for name, values in self.unconditional.items():
            if name not in self.conditions or np.shape(values) != self.conditions[name].shape[1:]:
                raise DataError(f"calibration set: unconditional.{name} belongs to no condition of its shape")

    @classmethod
    def of(cls, call: Call, step: Tensor) -> CalibrationSet:
        """Return the rows of a call as states at the positions `step` [N], on which no evaluation was spent."""
        plain = call.mapped(lambda rows: (rows.float() if rows.is_floating_point() else rows).cpu())
        conditions = {name: value.numpy() for name, value in plain.conditions.items()}
        return cls(plain.x.numpy(), step.cpu().numpy(), plain.t.numpy(), np.zeros(len(step), np.int64), conditions)

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, batch_size: int) -> Iterator[Call]:
        """Yield calls of at most `batch_size` states, every state once; with guidance, both halves of each batch."""
        without = {name: torch.from_numpy(np.array(value)) for name, value in self.unconditional.items()}
        for rows in slices(len(self), batch_size):
            x, t = (torch.from_numpy(np.array(part[rows])) for part in (self.x, self.t))
            given = {name: torch.from_numpy(np.array(part[rows])) for name, part in self.conditions.items()}
            yield both_halves(Call(x, t, given), without) if without else Call(x, t, given)

    def batch_steps(self, batch_size: int) -> Tensor:
        """Return the sampling step of each state that `batches` yields, int64 [N] in its order; with guidance [2 N]."""
        steps = torch.from_numpy(np.array(self.step))
        if not self.unconditional:
            return steps
        return torch.cat([half for rows in slices(len(self), batch_size) for half in (steps[rows], steps[rows])])

    def take(self, rows: np.ndarray) -> CalibrationSet:
        """Return the states number `rows`, int64 [M] or bool [N], in that order."""
        arrays = {key: np.array(part[rows]) for key, part in self._arrays().items()}
        return replace(self, **{key: arrays[key] for key in _OWN}, conditions=_below(_CONDITION, arrays))

    def save(self, path: Path) -> None:
        """Write as an uncompressed `.npz` file, atomically."""
        write_npz(path, **self._arrays(), **condition_arrays({}, self.unconditional))

    @classmethod
    def load(cls, path: Path) -> CalibrationSet:
        """Read what `save` wrote; states stay on disk until they are used.

        Raises:
            DataError: the file is missing, truncated, or holds something else.
        """
        arrays = npz_arrays(path)
        if "x" not in arrays:
            raise DataError(f"{path} is no calibration set: it holds {', '.join(arrays)}")
        axes = max(3, arrays["x"].ndim)
        require_arrays(path, arrays, {"x": ("f", axes), "step": ("iu", 1), "t": ("f", 1), "evaluations": ("iu", 1)})
        if any(key not in _OWN and not key.startswith((_CONDITION, _WITHOUT)) for key in arrays):
            raise DataError(f"{path} is no calibration set: it holds {', '.join(arrays)}")
        with naming(f"{path}: "):
            return cls(**{key: arrays[key] for key in _OWN}, conditions=_below(_CONDITION, arrays),
                       unconditional=_below(_WITHOUT, arrays))

    def _arrays(self) -> dict[str, np.ndarray]:
        """Those with a row for each state, by their names in a file."""
        return {key: getattr(self, key) for key in _OWN} | condition_arrays(self.conditions)


def condition_arrays(
    conditions: Mapping[str, object], unconditional: Mapping[str, object] | None = None
) -> dict[str, np.ndarray]:
    """Conditions [N, ...] and what stands for their absence, by the names that a file of a calibration set has."""
    return {f"{_CONDITION}{name}": np.asarray(value) for name, value in conditions.items()} | {
        f"{_WITHOUT}{name}": np.asarray(value) for name, value in (unconditional or {}).items()
    }


def _below(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the `arrays` whose names begin with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
