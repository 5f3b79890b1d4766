"""`ReconstructionModule`: one `fit` reconstructs a network, one epoch per block and one batch per optimiser step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from torch.utils.data import DataLoader

from ptq_exp.lightning.progress import ProgressBar
from ptq_exp.lightning.trainer import make_trainer
from ptq_exp.reconstruction import BlockReport, Reconstruction, learned_tensors, put_learned_
from ptq_exp.storage.atomic import atomic_path

_REPORTS = "block_reports"


class ReconstructionModule(pl.LightningModule):
    """Runs a `Reconstruction`; its state dict is what that changes in the quantized network, all else is there anew."""

    def __init__(self, reconstruction: Reconstruction) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = reconstruction.network
        self.reconstruction = reconstruction
        self.latest = torch.tensor(float("nan"))  # loss of the latest iteration

    def configure_optimizers(self) -> None:
        """Every block has an optimiser of its own, which lives no longer than it."""
        return None

    def train_dataloader(self) -> DataLoader:
        # an item is the number of an iteration: the block draws its rows itself, from the seed and its name
        return DataLoader(range(max(1, self.reconstruction.iterations)), batch_size=None)

    def on_train_start(self) -> None:
        self.network.eval()  # dropout
        self.reconstruction.reference.eval().to(self.device)

    def on_train_epoch_start(self) -> None:
        self.reconstruction.begin()

    def training_step(self, iteration: int) -> None:
        self.latest = self.reconstruction.step()

    def on_train_epoch_end(self) -> None:
        self.reconstruction.end()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return what `learned_tensors` does: a few of the network's tensors, as they are written after each block."""
        return {name: tensor.detach() for name, tensor in learned_tensors(self.network).items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> None:
        """Give the network what `state_dict` returned, or the same of all its tensors, as earlier versions stored them.

        Raises:
            DataError: it belongs to another network.
        """
        whole = {f"network.{name}": name for name in learned_tensors(self.network)}
        if whole.keys() <= state_dict.keys():
            state_dict = {name: state_dict[stored] for stored, name in whole.items()}
        put_learned_(self.network, state_dict)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[_REPORTS] = [report.to_dict() for report in self.reconstruction.reports]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.reconstruction.reports = [BlockReport.from_dict(plain) for plain in checkpoint[_REPORTS]]


class BlockCheckpoint(Checkpoint):
    """Writes `path` after each block, atomically; of Lightning's callbacks those of this class run last in an epoch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with atomic_path(self.path) as temporary:
            trainer.save_checkpoint(temporary, weights_only=False)  # the state of the loops, too


class BlockProgressBar(ProgressBar):
    """Shows number and name of the block, and the loss of the latest iteration."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: ReconstructionModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        done = pl_module.reconstruction
        title = f"block {len(done.reports) + 1} of {len(done.blocks)}: {done.block.name}"
        self.train_progress_bar.set_description(title)

    def get_metrics(self, trainer: pl.Trainer, pl_module: ReconstructionModule) -> dict[str, Any]:
        """Only the loss, read from the device only when it is shown."""
        return {"loss": f"{float(pl_module.latest):.3g}"}


def reconstruct_network(
    reconstruction: Reconstruction, checkpoint: Path, *, accelerator: str = "auto", progress_bar: bool = True
) -> list[BlockReport]:
    """Reconstruct all blocks, from `checkpoint` on where a killed run left one.

    It takes one device, as blocks depend on their predecessors.

    Returns:
        The reports of all blocks, also of those that an earlier run did.
    """
    callbacks = [BlockCheckpoint(checkpoint), *([BlockProgressBar(refresh_rate=20)] if progress_bar else [])]
    trainer = make_trainer(
        "reconstruction", accelerator=accelerator, devices=1, progress_bar=progress_bar, callbacks=callbacks,
        max_epochs=len(reconstruction.blocks), enable_checkpointing=True,
        reload_dataloaders_every_n_epochs=1,  # blocks may take different numbers of steps
    )
    trainer.fit(
        ReconstructionModule(reconstruction), ckpt_path=checkpoint if checkpoint.exists() else None, weights_only=True
    )
    return reconstruction.reports
