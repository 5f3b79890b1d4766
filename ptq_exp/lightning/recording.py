"""`RecordingModule`: records the calls of a pipeline's network with `Trainer.predict`, data-parallel over images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ptq_exp.calibration import CalibrationSet, condition_arrays
from ptq_exp.diffusion import Call, StepRecord, TimeGrid
from ptq_exp.diffusion.noise import CALIBRATION
from ptq_exp.lightning.writer import predict_at
from ptq_exp.pipelines import PipelineModel
from ptq_exp.storage.npz import npz_arrays


class RecordingModule(pl.LightningModule):
    """`predict` on (index [B], steps [B, m]) -> the calls of a pipeline's network in m steps of each image.

    {"x": [B, m k, ...], "t": [B, m k], "evaluations": [B], "condition.NAME": [B, m k, ...]}, step by step the k rows
    that the pipeline evaluates for the image, as float32 where they are numbers of fewer bits. `denoiser` makes the
    trajectories.
    """

    def __init__(self, model: PipelineModel, grid: TimeGrid, *, seed: int, denoiser: nn.Module | None = None) -> None:
        super().__init__()
        self.denoiser = denoiser or model.denoiser
        self.model, self.grid, self.sample_seed = model, grid, seed

    @property
    def names(self) -> tuple[str, ...]:
        """Of the arrays that `predict` gives."""
        conditions = {name: 0 for name in self.model.denoiser.layout.conditions}
        return ("x", "t", "evaluations", *condition_arrays(conditions))

    def predict_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, np.ndarray]:
        index, steps = (part.cpu() for part in batch)
        found: dict[tuple[int, int], Call] = {}

        def record(r: StepRecord) -> None:
            for image, place in (steps == r.step).nonzero().tolist():
                found[image, place] = r.call.mapped(lambda rows, image=image: _plain(rows[image :: len(steps)]))

        with torch.no_grad():
            self.model.run(
                self.denoiser, self.grid, index.tolist(), self.sample_seed, stream=CALIBRATION, device=self.device,
                steps=int(steps.max()) + 1, on_step=record,
            )
        calls = [[found[image, place] for place in range(steps.shape[1])] for image in range(len(steps))]

        def stacked(of: Callable[[Call], Tensor]) -> Tensor:
            return torch.stack([torch.cat([of(call) for call in steps_of_one]) for steps_of_one in calls])

        conditions = {
            name: stacked(lambda call, name=name: call.conditions[name]) for name in calls[0][0].conditions
        }
        evaluations = np.full(len(steps), (int(steps.max()) + 1) * len(calls[0][0].x))
        arrays = {"x": stacked(lambda call: call.x).numpy(), "t": stacked(lambda call: call.t).numpy()}
        return arrays | {"evaluations": evaluations} | condition_arrays(conditions)


def record_calibration_set(
    module: RecordingModule, trainer: pl.Trainer, steps: Tensor, batch_size: int, folder: Path
) -> CalibrationSet:
    """Record the calibration set of images 0..N-1, image i in the steps `steps[i]` ([N, m]).

    Batches already in `folder` are not drawn again. Rows of one image stand behind each other in the set.
    """
    arrays = npz_arrays(predict_at(module, trainer, (steps,), batch_size, folder))
    copies = arrays["x"].shape[1]
    rows = {name: values.reshape(-1, *values.shape[2:]) for name, values in arrays.items() if name != "evaluations"}
    evaluations = np.zeros((len(steps), copies), np.int64)
    evaluations[:, 0] = arrays["evaluations"]
    conditions = {name: rows[array] for name, array in zip(
        module.model.denoiser.layout.conditions, module.names[3:], strict=True
    )}
    step = steps.repeat_interleave(copies // steps.shape[1], 1).flatten().numpy()
    return CalibrationSet(rows["x"], step, rows["t"], evaluations.reshape(-1), conditions)


def _plain(rows: Tensor) -> Tensor:
    """Rows on the CPU, in a type that numpy has."""
    return rows.cpu().float() if rows.is_floating_point() else rows.cpu()
