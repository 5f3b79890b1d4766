"""`CalibrationModule`: collects calibration states with `Trainer.predict`, data-parallel over trajectories."""

from __future__ import annotations

from typing import NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ptq_exp.calibration import CalibrationSet, StateRequest, source
from ptq_exp.diffusion import DiffusionModel, TimeGrid


class States(NamedTuple):
    """States of one batch on the CPU, the sample indices and steps they belong to, and what they cost."""

    x: Tensor
    index: Tensor
    step: Tensor
    evaluations: int


class CalibrationModule(pl.LightningModule):
    """`predict` on batches (index [B], step [B]) -> `States`; see `ptq_exp.calibration.sources`."""

    def __init__(
        self, model: DiffusionModel, grid: TimeGrid, source_name: str, *, seed: int, eta: float = 0.0,
        images: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.denoiser = model.denoiser
        self.model, self.grid, self.source = model, grid, source(source_name)
        self.sample_seed, self.eta, self.images = seed, eta, images

    def predict_step(self, batch: tuple[Tensor, Tensor]) -> States:
        index, step = (part.cpu() for part in batch)
        request = StateRequest(
            self.grid, index.tolist(), step, self.sample_seed, eta=self.eta, images=self.images, device=self.device
        )
        x, evaluations = self.source(self.model, request)
        return States(x, index, step, evaluations)


def collect_calibration_set(
    module: CalibrationModule, trainer: pl.Trainer, steps: Tensor, batch_size: int
) -> CalibrationSet:
    """Run `module` for samples 0..N-1, sample i as it enters `steps[i]` ([N] positions in the grid)."""
    batches = DataLoader(TensorDataset(torch.arange(len(steps)), steps), batch_size=batch_size)
    parts: list[States] = trainer.predict(module, batches)
    index = torch.cat([part.index for part in parts])
    order = index.argsort()
    return CalibrationSet(
        x=torch.cat([part.x for part in parts])[order],
        step=steps,
        t=module.grid.network_time(steps),
        evaluations=sum(part.evaluations for part in parts),
    )
