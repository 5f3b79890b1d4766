"""What an experiment is given, looked at before anything that takes time: the network, real images, statistics."""

from __future__ import annotations

import numpy as np

from ptq_exp.calibration import chosen_images
from ptq_exp.calibration.sources import NO_IMAGES
from ptq_exp.diffusion import check_network
from ptq_exp.errors import DataError
from ptq_exp.experiment.noise import check_statistics
from ptq_exp.experiment.run import Setup
from ptq_exp.settings.schema import FULL_PRECISION
from ptq_exp.storage.pieces import slices

_BATCH = 64


def check_inputs(setup: Setup) -> None:
    """Raise the error that would come hours later: numbers that are not finite, images or statistics that do not fit.

    Raises:
        PTQError: one line that names the setting, and the file where there is one.
    """
    config = setup.config
    check_network(setup.model, setup.grid, config.seed, setup.device, config.model.checkpoint)
    if config.bits.name == FULL_PRECISION or setup.artifact is not None:
        return
    check_statistics(setup)
    try:
        _check_images(setup)
    except DataError as error:
        if "model.images" in str(error):  # says it already
            raise
        raise DataError(f"model.images.path: {error}") from error


def _check_images(setup: Setup) -> None:
    """Read the images that calibration will start from.

    A source of somebody else's may choose others: then they are opened alone.
    """
    images, calibration = setup.images, setup.config.calibration
    if calibration.source not in ("raw", "diffuse"):
        return
    if images is None:
        raise DataError(NO_IMAGES)
    chosen = chosen_images(len(images), range(calibration.n_samples), setup.config.seed)
    channels, height, width = setup.model.image_shape
    for rows in slices(len(chosen), _BATCH):
        found = np.asarray(images[chosen[rows]])
        if found.dtype != np.uint8 or found.shape[1:] != (height, width, channels):
            raise DataError(
                f"the images are {found.dtype} {list(found.shape[1:])} (height, width, channels), but the model "
                f"{setup.model.name} works on uint8 {[height, width, channels]}: set model.images.path to such images"
            )
