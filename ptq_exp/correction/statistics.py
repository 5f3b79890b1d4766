"""Statistics of quantization noise per sampling step (PTQD, NeurIPS 2023, section 4.1).

The error of a quantized noise estimate is split into a part that is correlated with the full-precision estimate, a bias
per channel and a residual: eps_q - eps = k eps + bias + residual.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ptq_exp.errors import DataError
from ptq_exp.storage.atomic import write_npz
from ptq_exp.storage.finite import is_finite, require_finite
from ptq_exp.storage.npz import npz_arrays, require_arrays

CONVENTIONS = ("paper", "code")
_TENSORS = ("k", "bias", "residual_std", "r", "kurtosis", "k_stderr", "bias_stderr", "k_unshrunk", "counts")


@dataclass(frozen=True)
class NoiseStatistics:
    """What each of S sampling steps does to a noise estimate of C channels; float64 tensors.

    Attributes:
        k: [S] slope of the error on eps; negative where quantization shrinks the estimate.
        bias: [S, C] mean of error - k eps (`paper`), or of the raw error (`code`).
        residual_std: [S] standard deviation of what is left: of error - k eps around its channel means, pooled over
            samples (`paper`); mean over samples of the unbiased deviation over channels and pixels (`code`).
        r: [S] coefficient of correlation of error and eps.
        kurtosis: [S] excess kurtosis of the residual; 0 for a Gaussian.
        k_stderr, bias_stderr: [S], [S, C] standard errors. Pixels of one image are not independent: samples are what is
            counted; infinite for a single sample.
        k_unshrunk: [S] the slope of the regression before any shrinkage.
        counts: [S] samples behind each step.
        convention: "paper" or "code"; the published code also ignores negative slopes when it corrects.
        made_for: what the statistics belong to: grid, bits, model, ...; empty if nobody said.
    """

    k: Tensor
    bias: Tensor
    residual_std: Tensor
    r: Tensor
    kurtosis: Tensor
    k_stderr: Tensor
    bias_stderr: Tensor
    k_unshrunk: Tensor
    counts: Tensor
    convention: str = "paper"
    made_for: Mapping[str, object] | None = None

    def __len__(self) -> int:
        return len(self.k)

    @property
    def slope(self) -> Tensor:
        """[S] the slope that a correction divides by: `k`, or max(k, 0) as the published code does."""
        return self.k.clamp(min=0) if self.convention == "code" else self.k

    @property
    def eps_noise_std(self) -> Tensor:
        """[S] standard deviation of the noise left in a corrected estimate: residual_std / (1 + slope)."""
        return self.residual_std / (1 + self.slope)

    def at_steps(self, steps: Tensor) -> NoiseStatistics:
        """Return the statistics of the positions `steps` (int64) as a new object."""
        return replace(self, **{name: getattr(self, name)[steps] for name in _TENSORS})

    def summary(self) -> str:
        """One line: sizes of slope and bias, and how far they were shrunk for want of significance."""
        unsure = (self.k_unshrunk.abs() < 2 * self.k_stderr) & (self.k_unshrunk != 0)
        shrunk = int(((self.k.abs() < 0.9 * self.k_unshrunk.abs()) & (self.k != 0)).sum())
        line = (
            f"k {float(self.k.min()):+.4f} to {float(self.k.max()):+.4f}, |bias| up to "
            f"{float(self.bias.abs().max()):.2g}, residual std {float(self.residual_std.min()):.2g} to "
            f"{float(self.residual_std.max()):.2g}"
        )
        if bool((self.k == 0).all()):
            return line
        return (
            f"{line}; k differs from 0 by less than two standard errors in {int(unsure.sum())} of {len(self)} "
            f"steps, was shrunk by more than a tenth in {shrunk} and set to 0 in {int((self.k == 0).sum())}"
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write all tensors and `made_for` to one `.npz` file, atomically."""
        arrays = {name: getattr(self, name).numpy() for name in _TENSORS}
        write_npz(
            Path(path), convention=np.array(self.convention), made_for=np.array(json.dumps(self.made_for)), **arrays
        )

    @classmethod
    def load(cls, path: str | os.PathLike) -> NoiseStatistics:
        """Read what `save` wrote.

        Raises:
            DataError: no such file, a damaged one, or one that holds something else.
        """
        arrays = npz_arrays(path)
        missing = [name for name in (*_TENSORS, "convention", "made_for") if name not in arrays]
        if missing:
            raise DataError(
                f"{path} holds no noise statistics: {', '.join(missing)} missing; give noise_statistics.npz"
            )
        expected = {name: ("iuf" if name == "counts" else "f", 2 if "bias" in name else 1) for name in _TENSORS}
        require_arrays(path, arrays, expected)
        if len({len(arrays[name]) for name in _TENSORS}) != 1 or arrays["bias"].shape != arrays["bias_stderr"].shape:
            raise DataError(f"{path}: its arrays are of different numbers of steps or channels")
        _require_numbers(path, arrays)
        tensors = {name: torch.from_numpy(np.array(arrays[name])) for name in _TENSORS}
        try:
            made_for = json.loads(str(arrays["made_for"]))
        except ValueError as error:
            raise DataError(f"{path}: made_for is no JSON text") from error
        return cls(**tensors, convention=str(arrays["convention"]), made_for=made_for)


def _require_numbers(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise DataError for numbers that are no statistics. Standard errors of a single sample may be infinite."""
    again = "fit the statistics again"
    require_finite({name: arrays[name] for name in _TENSORS if "stderr" not in name}, path, again)
    for name in ("k_stderr", "bias_stderr"):
        if not is_finite(arrays[name], or_infinite=True):
            raise DataError(f"{path}: {name} holds NaN; {again}")
    for name in ("residual_std", "k_stderr", "bias_stderr", "counts"):
        if arrays[name].size and arrays[name].min() < 0:
            raise DataError(f"{path}: {name} holds {arrays[name].min():g}, which is never negative; {again}")
