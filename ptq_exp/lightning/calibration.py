"""`CalibrationModule`: collects calibration states with `Trainer.predict`, data-parallel over trajectories."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytorch_lightning as pl
from torch import Tensor, nn

from ptq_exp.calibration import Labelled, StateRequest, condition_arrays, labelled, source
from ptq_exp.calibration.sources import ImageSource
from ptq_exp.diffusion import DiffusionModel, TimeGrid
from ptq_exp.diffusion.noise import CALIBRATION
from ptq_exp.lightning.writer import predict_to_file, sample_indices
from ptq_exp.storage.pieces import Parts


class CalibrationModule(pl.LightningModule):
    """`predict` on (index [B], step [B]) -> {"x": states, "evaluations": [B]}; see `ptq_exp.calibration.sources`.

    `denoiser` (the model's own by default) is guided where guidance is wanted.
    """

    def __init__(
        self, model: DiffusionModel, grid: TimeGrid, source_name: str, *, seed: int, denoiser: nn.Module | None = None,
        images: ImageSource | None = None,
    ) -> None:
        super().__init__()
        self.denoiser, self.first_stage = denoiser or model.denoiser, model.first_stage
        self.model, self.grid, self.source = model, grid, source(source_name)
        self.sample_seed, self.images = seed, images

    def predict_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, np.ndarray]:
        index, step = (part.cpu() for part in batch)
        request = StateRequest(
            self.grid, index.tolist(), step, self.sample_seed, denoiser=self.denoiser, images=self.images,
            device=self.device,
        )
        x, evaluations = self.source(self.model, request)
        return {"x": x.numpy(), "evaluations": evaluations.numpy()}


def collect_calibration_set(
    module: CalibrationModule, trainer: pl.Trainer, states: Labelled | Tensor, batch_size: int, folder: Path,
    path: Path, *, guided: bool = False,
) -> None:
    """Write the calibration set of samples 0..N-1, sample i as `states` has it, to `path`.

    Batches already in `folder` are not computed again. `states` may be the positions [N] that the samples enter, each
    then with the time of its position. `guided`: they are seen without their conditions, too; see `CalibrationSet`.
    """
    if isinstance(states, Tensor):
        states = labelled(states, module.grid)
    steps = states.enters
    parts = Parts(folder, range(0, len(steps), batch_size), len(steps), ("x", "evaluations"))
    model = module.model
    conditions = model.draw_conditions(range(len(steps)), module.sample_seed, CALIBRATION)
    extra = {"step": states.step.numpy(), "t": states.t.numpy()}
    extra |= condition_arrays(conditions, model.unconditional if guided else {})

    def batch_of(start: int) -> tuple[Tensor, Tensor]:
        index = sample_indices(start, min(batch_size, len(steps) - start))
        return index, steps[index]

    predict_to_file(module, trainer, parts, batch_of, path, **extra)
