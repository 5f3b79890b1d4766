"""The Lightning Trainer as this project uses it: `predict` only, quiet, with a named progress bar."""

from __future__ import annotations

import logging
import warnings

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar

_HARMLESS = (
    ".*does not have many workers.*",  # an item is a sample index: loader processes would have nothing to do
    ".*infer the batch indices.*",  # the writer reads the sample indices from the batch itself
    ".*LeafSpec.*deprecated.*",  # Lightning about its own use of torch
)


class StageProgressBar(TQDMProgressBar):
    """A progress bar with the elapsed and remaining time, titled with what is being computed."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title

    @property
    def predict_description(self) -> str:
        return self.title


def make_trainer(
    title: str, *, accelerator: str = "auto", devices: int = 1, strategy: str = "auto", progress_bar: bool = True
) -> pl.Trainer:
    """A Trainer for one stage; `title` names its progress bar."""
    for name in ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _HARMLESS:
        warnings.filterwarnings("ignore", message=message)
    return pl.Trainer(
        accelerator=accelerator, devices=devices, strategy=strategy, logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=progress_bar, inference_mode=False,
        callbacks=[StageProgressBar(title)] if progress_bar else [],
    )  # fmt: skip
