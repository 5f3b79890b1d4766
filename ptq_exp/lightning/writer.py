"""`PartWriter`: what `Trainer.predict` computes goes to disk batch by batch, and only what is missing is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BasePredictionWriter
from torch.utils.data import DataLoader

from ptq_exp.storage.pieces import Parts


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


def sample_indices(start: int, batch_size: int) -> torch.Tensor:
    """Return indices start..start+batch_size-1, int64: batches have one shape, what runs past the end is cut later."""
    return torch.arange(start, start + batch_size)
