"""`PartWriter`: what `Trainer.predict` computes goes to disk batch by batch, and only what is missing is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BasePredictionWriter
from torch.utils.data import DataLoader

from ptq_exp.storage.npz import npz_arrays
from ptq_exp.storage.pieces import JOINED, Parts


class PartWriter(BasePredictionWriter):
    """Writes each prediction (a dictionary of arrays [B, ...]) as the piece of its first sample, whatever the rank."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(write_interval="batch")
        self.parts = parts

    def write_on_batch_end(
        self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx
    ) -> None:
        index = batch[0] if isinstance(batch, (tuple, list)) else batch
        self.parts.write(int(index[0]), **prediction)


def predict_to_file(
    module: pl.LightningModule, trainer: pl.Trainer, parts: Parts, batch_of: Callable[[int], object], path: Path,
    **extra,
) -> None:
    """Run `module` on the batches of `parts` that are missing, and join all to the `.npz` file `path`.

    Args:
        batch_of: start -> the batch; a tensor of sample indices, or a tuple that begins with it.
        extra: further arrays for the file.
    """
    while not parts.join(path, **extra):
        trainer.callbacks.append(writer := PartWriter(parts))
        missing = parts.missing()
        # no device may be without a batch; one that is computed twice is written twice, and is the same
        missing += missing[-1:] * (trainer.world_size - len(missing))
        batches = [batch_of(start) for start in missing]
        try:
            trainer.predict(module, DataLoader(batches, batch_size=None), return_predictions=False)
        finally:
            trainer.callbacks.remove(writer)


def measure(module: Any, trainer: pl.Trainer, n: int, batch_size: int, folder: Path) -> dict[str, np.ndarray]:
    """Run `module` on samples 0..n-1; batches already in `folder` are not computed again.

    Args:
        module: one whose `names` and `totals` say what it predicts, see `Parts`.

    Returns:
        The arrays, memory-mapped.
    """
    parts = Parts(folder, range(0, n, batch_size), n, module.names, module.totals)
    predict_to_file(module, trainer, parts, lambda start: sample_indices(start, batch_size), folder / JOINED)
    return npz_arrays(folder / JOINED)


def predict_at(
    module: Any, trainer: pl.Trainer, columns: Sequence[torch.Tensor], batch_size: int, folder: Path,
    **extra: np.ndarray,
) -> Path:
    """Run `module` on (i, *rows i of the `columns`), as `measure` does; returns the file of all arrays."""
    n = len(columns[0])

    def batch_of(start: int) -> tuple[torch.Tensor, ...]:
        places = sample_indices(start, min(batch_size, n - start))
        return places, *(column[places] for column in columns)

    parts = Parts(folder, range(0, n, batch_size), n, module.names)
    predict_to_file(module, trainer, parts, batch_of, folder / JOINED, **extra)
    return folder / JOINED


def sample_indices(start: int, batch_size: int) -> torch.Tensor:
    """Return indices start..start+batch_size-1, int64: batches have one shape, what runs past the end is cut later."""
    return torch.arange(start, start + batch_size)
