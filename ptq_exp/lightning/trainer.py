"""The Lightning Trainer as this project uses it: quiet, with a named progress bar."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ptq_exp.errors import ConfigError, one_line
from ptq_exp.lightning.progress import ProgressBar

_HARMLESS = (
    ".*does not have many workers.*",  # an item is a sample index: loader processes would have nothing to do
    ".*infer the batch indices.*",  # the writer reads the sample indices from the batch itself
    ".*LeafSpec.*deprecated.*",  # Lightning about its own use of torch
    ".*configure_optimizers` returned `None`.*",  # blocks have optimisers of their own
    ".*in eval mode at the start of training.*",  # reconstruction means it: dropout would be active otherwise
)


class StageProgressBar(ProgressBar):
    """A progress bar with the elapsed and remaining time, titled with what is being computed."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title

    @property
    def predict_description(self) -> str:
        return self.title


def make_trainer(
    title: str, *, accelerator: str = "auto", devices: int = 1, strategy: str = "auto", progress_bar: bool = True,
    callbacks: Sequence[pl.Callback] | None = None, **settings: Any,
) -> pl.Trainer:
    """Build a Trainer for one stage; `title` names its progress bar.

    `callbacks` (with a bar of their own, if any) and further `settings` of the Trainer are for `fit`. Its processes are
    its own: what a scheduler's variables say of tasks is not about them.

    Raises:
        ConfigError: Lightning knows no such accelerator or strategy, or it is not in this machine.
    """
    for name in ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _HARMLESS:
        warnings.filterwarnings("ignore", message=message)
    if callbacks is None:
        callbacks = [StageProgressBar(title)] if progress_bar else []
    try:
        return pl.Trainer(
            accelerator=accelerator, devices=devices, strategy=strategy, logger=False,
            enable_model_summary=False, enable_progress_bar=progress_bar, inference_mode=False,
            callbacks=list(callbacks), plugins=[LightningEnvironment()], **{"enable_checkpointing": False} | settings,
        )
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        given = f"trainer.accelerator={accelerator}, trainer.devices={devices}, trainer.strategy={strategy}"
        raise ConfigError(f"{given}: {one_line(error, 2000)}") from error
