"""`EvaluationModule`: draws images with `Trainer.predict`, one file per batch, so that a killed run resumes."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BasePredictionWriter
from torch import nn
from torch.utils.data import DataLoader

from ptq_exp.diffusion import DiffusionModel, TimeGrid, padded_batches
from ptq_exp.evaluation.images import to_uint8
from ptq_exp.files import write_npz


class EvaluationModule(pl.LightningModule):
    """`predict` on sample indices [B] -> images uint8 [B, H, W, C], drawn with `denoiser` (FP or quantized)."""

    def __init__(
        self, model: DiffusionModel, denoiser: nn.Module, grid: TimeGrid, *, seed: int, eta: float = 0.0
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.model, self.grid, self.sample_seed, self.eta = model, grid, seed, eta

    def predict_step(self, indices: torch.Tensor) -> np.ndarray:
        x = self.model.sample(
            self.denoiser, self.grid, indices.tolist(), self.sample_seed, eta=self.eta, device=self.device
        )
        return to_uint8(x)


class ImageWriter(BasePredictionWriter):
    """Writes each batch of images to `folder`/<first index>.npz as soon as it is drawn, whatever the rank."""

    def __init__(self, folder: Path) -> None:
        super().__init__(write_interval="batch")
        self.folder = folder

    def write_on_batch_end(
        self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx
    ) -> None:
        write_npz(part_path(self.folder, int(batch[0])), images=prediction)


def part_path(folder: Path, start: int) -> Path:
    """File of the batch whose first sample index is `start`."""
    return folder / f"{start:08d}.npz"


def draw_images(
    module: EvaluationModule, trainer: pl.Trainer, n: int, batch_size: int, folder: Path
) -> np.ndarray:
    """Draw images 0..n-1, uint8 [n, H, W, C]; batches already in `folder` are not drawn again.

    `folder` must belong to this model, grid, seed and batch size alone. It is removed once all is read. Every batch
    holds exactly `batch_size` samples, so that image i does not depend on n, on the order or on a resume.
    """
    batches = padded_batches(n, batch_size)
    while (images := _read_parts(folder, batches)) is None:
        missing = [torch.tensor(list(b)) for b in batches if not part_path(folder, b.start).exists()]
        trainer.callbacks.append(writer := ImageWriter(folder))
        try:
            trainer.predict(module, DataLoader(missing, batch_size=None), return_predictions=False)
        finally:
            trainer.callbacks.remove(writer)
    shutil.rmtree(folder, ignore_errors=True)
    return images[:n]


def _read_parts(folder: Path, batches: Sequence[range]) -> np.ndarray | None:
    """All batches in order, or None if one is missing; a damaged file counts as missing and is removed."""
    parts = []
    for batch in batches:
        path = part_path(folder, batch.start)
        try:
            with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as archive:
                parts.append(archive["images"])
        except FileNotFoundError:
            return None
        # RuntimeError: a damaged directory of the archive claims encryption or an unknown version
        except (OSError, KeyError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile):
            path.unlink(missing_ok=True)
            return None
    return np.concatenate(parts)
