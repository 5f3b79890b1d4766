"""Stroke width and slant of digits, measured from their pixels, and cut into thirds within each class."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from scipy.ndimage import distance_transform_edt

from ptq_exp.embedded.digits import LATENT_IMAGE_SIZE, N_CLASSES, digits
from ptq_exp.evaluation.images import to_uint8


def stroke_width(images: np.ndarray) -> np.ndarray:
    """Measure the mean stroke width in pixels, float64 [N], of uint8 images [N, H, W, 1] (255 = ink).

    In a ribbon of width w the distance to its edge is w / 4 on average, so w is four times the mean of the distance
    transform over the ink (values above 127), less the half pixel from the edge to the centre of the nearest paper.
    0 for an image without ink.
    """
    widths = []
    for image in images[..., 0]:
        ink = np.pad(image > 127, 1)
        widths.append(4 * (distance_transform_edt(ink)[ink].mean() - 0.5) if ink.any() else 0.0)
    return np.array(widths)


def slant(images: np.ndarray) -> np.ndarray:
    """Measure the slant, float64 [N], of uint8 images [N, H, W, 1]: positive where the top leans to the right.

    The shear that makes ink's horizontal and vertical positions uncorrelated: -cov(x, y) / var(y), with y downwards
    and pixels weighted by ink. 0 for an image without ink or with all of it on one line.
    """
    ink = images[..., 0].astype(np.float64)
    y, x = np.mgrid[: ink.shape[1], : ink.shape[2]]
    mass = np.maximum(ink.sum((1, 2)), 1e-12)
    dx = x - ((ink * x).sum((1, 2)) / mass)[:, None, None]
    dy = y - ((ink * y).sum((1, 2)) / mass)[:, None, None]
    return -(ink * dx * dy).sum((1, 2)) / np.maximum((ink * dy * dy).sum((1, 2)), 1e-12)


MEASURES = {"width": stroke_width, "slant": slant}


class ClassStatistics(NamedTuple):
    """Of one measure on the real digits: mean and standard deviation [10], and the two cuts between thirds [10, 2]."""

    mean: np.ndarray
    std: np.ndarray
    cuts: np.ndarray


@cache
def real_statistics(measure: str) -> ClassStatistics:
    """Compute the statistics of `measure` ("width" or "slant") over all 1,797 digits at 32x32, class by class."""
    images, labels = digits("all", LATENT_IMAGE_SIZE)
    values = MEASURES[measure](to_uint8(images))
    of_class = [values[labels.numpy() == label] for label in range(N_CLASSES)]
    cuts = np.array([np.quantile(part, [1 / 3, 2 / 3]) for part in of_class])
    return ClassStatistics(np.array([v.mean() for v in of_class]), np.array([v.std() for v in of_class]), cuts)


def levels(measure: str, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Say in which third of its class each image lies: int64 [N] of -1, 0, 1; `labels` [N] in 0..9."""
    cuts = real_statistics(measure).cuts[labels]
    return (MEASURES[measure](images)[:, None] > cuts).sum(1) - 1


def standardised(measure: str, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Measure images in standard deviations from the mean of the real digits of their class, float64 [N]."""
    real = real_statistics(measure)
    return (MEASURES[measure](images) - real.mean[labels]) / real.std[labels]
