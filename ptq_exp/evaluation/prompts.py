"""Scores of images that were drawn from prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ptq_exp.errors import DataError
from ptq_exp.evaluation.statistics import FeatureStatistics


def prompt_accuracy(generated: FeatureStatistics, classes: Sequence[int]) -> float:
    """Return the share of images in which the feature extractor's classifier sees the class that was asked for.

    Args:
        generated: features of N images.
        classes: [N] asked classes, columns of `generated.probabilities`.

    Raises:
        DataError: not one class per image, or a class that the classifier does not know.
    """
    classes = np.asarray(classes)
    n, known = generated.probabilities.shape
    if classes.shape != (n,) or not np.issubdtype(classes.dtype, np.integer):
        found = f"{classes.shape} of {classes.dtype}"
        raise DataError(f"prompt accuracy needs one class, an integer, for each of {n} images, found {found}")
    if n and not (0 <= classes.min() and classes.max() < known):
        found = f"{classes.min()}..{classes.max()}"
        raise DataError(f"prompt accuracy: asked classes {found}, but the classifier knows 0..{known - 1}")
    return float((generated.probabilities.argmax(1) == classes).mean())
