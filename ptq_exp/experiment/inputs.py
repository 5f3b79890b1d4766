"""What an experiment is given, looked at before anything that takes time: the network, real images, statistics."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptq_exp.calibration import chosen_images
from ptq_exp.calibration.sources import NO_IMAGES
from ptq_exp.errors import DataError, naming
from ptq_exp.experiment.run import Run, calibration_images
from ptq_exp.settings.schema import ExperimentConfig
from ptq_exp.storage.pieces import slices

_BATCH = 64


def checked_images(run: Run, config: ExperimentConfig) -> Any:
    """Open the real images that calibration starts from, and read those that it will take; None where it takes none.

    A source of somebody else's may choose others: then they are opened alone.

    Raises:
        PTQError: one line that names the setting, and the file where there is one.
    """
    with naming("model.images.path: ", unless="model.images"):
        images = calibration_images(config)
        if config.calibration.source in ("raw", "diffuse"):
            _check_images(run, images, config.calibration.n_samples)
    return images


def _check_images(run: Run, images: Any, n: int) -> None:
    if images is None:
        raise DataError(NO_IMAGES)
    chosen = chosen_images(len(images), range(n), run.seed)
    channels, height, width = run.model.image_shape
    for rows in slices(len(chosen), _BATCH):
        found = np.asarray(images[chosen[rows]])
        if found.dtype != np.uint8 or found.shape[1:] != (height, width, channels):
            raise DataError(
                f"the images are {found.dtype} {list(found.shape[1:])} (height, width, channels), but the model "
                f"{run.model.name} works on uint8 {[height, width, channels]}: set model.images.path to such images"
            )
