"""`CalibrationModule`: collects calibration states with `Trainer.predict`, data-parallel over trajectories."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
from torch import Tensor, nn

from ptq_exp.calibration import CalibrationSet, Labelled, StateRequest, condition_arrays, source
from ptq_exp.calibration.sources import ImageSource
from ptq_exp.diffusion import DiffusionModel, TimeGrid
from ptq_exp.diffusion.noise import CALIBRATION
from ptq_exp.lightning.writer import predict_at
from ptq_exp.storage.pieces import slices

BY_STEP = "by_step"
"""Folder of the pieces; those of earlier versions, which hold other samples, lie beside it."""


class CalibrationModule(pl.LightningModule):
    """`predict` on (place [B], index [B], step [B]) -> {"x": states, "evaluations": [B]}; see `StateRequest`.

    `denoiser` (the model's own by default) is guided where guidance is wanted.
    """

    names = ("x", "evaluations")

    def __init__(
        self, model: DiffusionModel, grid: TimeGrid, source_name: str, *, seed: int, denoiser: nn.Module | None = None,
        images: ImageSource | None = None,
    ) -> None:
        super().__init__()
        self.denoiser, self.first_stage = denoiser or model.denoiser, model.first_stage
        self.model, self.grid, self.source = model, grid, source(source_name)
        self.sample_seed, self.images = seed, images

    def predict_step(self, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, np.ndarray]:
        _, index, step = (part.cpu() for part in batch)
        request = StateRequest(
            self.grid, index.tolist(), step, self.sample_seed, denoiser=self.denoiser, images=self.images,
            device=self.device,
        )
        x, evaluations = self.source(self.model, request)
        return {"x": x.numpy(), "evaluations": evaluations.numpy()}


def collect_calibration_set(
    module: CalibrationModule, trainer: pl.Trainer, states: Labelled, batch_size: int, folder: Path, *,
    guided: bool = False,
) -> CalibrationSet:
    """Collect the calibration set of samples 0..N-1, sample i as `states` has it.

    Samples of nearly the same step share a batch, so that it stays full until all of them have arrived. Batches already
    in `folder` are not computed again. `guided`: states are seen without their conditions, too; see `CalibrationSet`.
    """
    model, order = module.model, states.order
    conditions = model.draw_conditions(order.tolist(), module.sample_seed, CALIBRATION)
    extra = {"step": states.step[order].numpy(), "t": states.t[order].numpy()}
    extra |= condition_arrays(conditions, model.unconditional if guided else {})
    path = predict_at(module, trainer, (order, states.enters[order]), batch_size, folder / BY_STEP, **extra)
    return _reordered(CalibrationSet.load(path), order.argsort().numpy(), batch_size, folder)


def _reordered(found: CalibrationSet, rows: np.ndarray, batch_size: int, folder: Path) -> CalibrationSet:
    """Return the states number `rows`, in that order; the large arrays in nameless files of `folder`, mapped."""

    def mapped(values: np.ndarray) -> np.ndarray:
        with tempfile.TemporaryFile(dir=folder) as file:  # of this process alone, where several devices work
            made = np.memmap(file, values.dtype, "w+", shape=values.shape)
        for part in slices(len(rows), batch_size):
            made[part] = values[rows[part]]
        return made

    return replace(
        found, x=mapped(found.x), step=found.step[rows], t=found.t[rows], evaluations=found.evaluations[rows],
        conditions={name: mapped(values) for name, values in found.conditions.items()},
    )
