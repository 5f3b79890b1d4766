"""`EvaluationModule`: draws images with `Trainer.predict`, one file per batch, so that a killed run resumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn

from ptq_exp.diffusion import DiffusionModel, TimeGrid, wider
from ptq_exp.errors import DataError
from ptq_exp.evaluation.images import to_uint8
from ptq_exp.lightning.writer import predict_to_file, sample_indices
from ptq_exp.storage.pieces import Parts


class EvaluationModule(pl.LightningModule):
    """`predict` on sample indices [B] -> {"arr_0": images uint8 [B, H, W, C]}.

    `denoiser` is the full-precision or a quantized one, guided where guidance is wanted. `eps_noise_std` [S] and
    `convention` tell the sampler of noise in its estimates; see `ptq_exp.diffusion.sample`.
    """

    def __init__(
        self, model: DiffusionModel, denoiser: nn.Module, grid: TimeGrid, *, seed: int,
        eps_noise_std: torch.Tensor | None = None, convention: str = "exact",
    ) -> None:
        super().__init__()
        self.denoiser, self.first_stage = denoiser, model.first_stage
        self.model, self.grid, self.sample_seed = model, grid, seed
        self.noise_in_eps = {"eps_noise_std": eps_noise_std, "convention": convention}

    def predict_step(self, indices: torch.Tensor) -> dict[str, np.ndarray]:
        images = self.model.sample(
            self.denoiser, self.grid, indices.tolist(), self.sample_seed, device=self.device, **self.noise_in_eps
        )
        try:
            return {"arr_0": to_uint8(images)}
        except DataError as error:
            dtype = next((parameter.dtype for parameter in self.denoiser.parameters()), torch.float32)
            remedy = wider(dtype) or "check model.checkpoint, the sampler and the bits"
            raise DataError(f"{error}: the sampler diverged; {remedy}") from error


def draw_images(
    module: EvaluationModule, trainer: pl.Trainer, n: int, batch_size: int, folder: Path, path: Path
) -> None:
    """Draw images 0..n-1 into `path`, a samples file (arr_0 uint8 [n, H, W, C], arr_1 labels [n] where there are any).

    Batches already in `folder` are not drawn again; it must belong to this model, grid, seed and batch size alone.
    Every batch holds exactly `batch_size` samples, so that image i does not depend on n, on the order or on a resume.
    """
    parts = Parts(folder, range(0, n, batch_size), n, ("arr_0",))
    labels = module.model.labels(range(n), module.sample_seed)
    extra = {} if labels is None else {"arr_1": labels.numpy()}
    predict_to_file(module, trainer, parts, lambda start: sample_indices(start, batch_size), path, **extra)
