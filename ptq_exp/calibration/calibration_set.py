"""`CalibrationSet`: paired states and times on which quantizer ranges are chosen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ptq_exp.errors import DataError


@dataclass(frozen=True)
class CalibrationSet:
    """Calibration samples in the order of their sample index.

    Attributes:
        x: float32 [N, C, H, W], the state that enters the step.
        step: int64 [N], the position in the `TimeGrid` (0 = noisiest).
        t: float32 [N], the network time of that step.
        evaluations: network evaluations spent on making it.
    """

    x: Tensor
    step: Tensor
    t: Tensor
    evaluations: int

    def __post_init__(self) -> None:
        if len(self.x) == 0:
            raise DataError("the calibration set is empty: calibration.n_samples must be at least 1")
        if not len(self.x) == len(self.step) == len(self.t):
            raise DataError(f"calibration set: {len(self.x)} states, {len(self.step)} steps, {len(self.t)} times")
        if not torch.isfinite(self.x).all():
            raise DataError("the calibration set holds NaN or infinity: check model.checkpoint and the sampler")

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(x, t) in batches of at most `batch_size`; every sample once."""
        yield from zip(self.x.split(batch_size), self.t.split(batch_size), strict=True)

    def save(self, path: Path) -> None:
        """Write as safetensors."""
        tensors = {"x": self.x.contiguous(), "step": self.step.contiguous(), "t": self.t.contiguous()}
        save_file(tensors, path, metadata={"evaluations": str(self.evaluations)})

    @classmethod
    def load(cls, path: Path) -> CalibrationSet:
        """Read what `save` wrote."""
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in ("x", "step", "t")}
            return cls(**tensors, evaluations=int(file.metadata()["evaluations"]))
