"""Features of a set of images as one artefact, their scores, and the unit of the paired increase."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ptq_exp.errors import DataError
from ptq_exp.evaluation.metrics import frechet_distance_from_features, inception_score
from ptq_exp.files import write_npz

_ARRAYS = ("pooled", "spatial", "probabilities")


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Everything that IS, FID and sFID need of N images under one feature extractor.

    Attributes:
        pooled: [N, D] features of the last pooling layer (FID).
        spatial: [N, K] flattened first channels of a mid-level feature map (sFID).
        probabilities: [N, C] softmax outputs (IS).
        name: which images and which extractor, for tables and captions.

    Raises:
        DataError: an array is not two-dimensional, or the three disagree about N.
    """

    pooled: np.ndarray
    spatial: np.ndarray
    probabilities: np.ndarray
    name: str = ""

    def __post_init__(self) -> None:
        shapes = {field: np.shape(getattr(self, field)) for field in _ARRAYS}
        two_dimensional = all(len(shape) == 2 for shape in shapes.values())
        if not two_dimensional or len({shape[0] for shape in shapes.values()}) != 1:
            raise DataError(f"features {self.name!r} must be three arrays [N, ...] of one N, found {shapes}")

    def __len__(self) -> int:
        return len(self.pooled)

    def save(self, path: str | os.PathLike) -> None:
        """Write to an `.npz` file, atomically."""
        write_npz(path, name=np.array(self.name), **{field: getattr(self, field) for field in _ARRAYS})

    @classmethod
    def load(cls, path: str | os.PathLike) -> FeatureStatistics:
        """Read what `save` wrote.

        Raises:
            DataError: the file is missing, truncated, or holds something else.
        """
        try:
            with np.load(path, allow_pickle=False) as archive:
                return cls(*(archive[field] for field in _ARRAYS), name=str(archive["name"]))
        except (OSError, KeyError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is no readable file of feature statistics: {error}") from error


def score(generated: FeatureStatistics, reference: FeatureStatistics) -> dict[str, float]:
    """FID, sFID (lower is better) and IS (higher is better) of generated images.

    Returns:
        {"fid": ..., "sfid": ..., "is": ...}; IS does not depend on the reference.

    Raises:
        DataError: the two come from extractors of different feature sizes, or hold NaN or infinity.
    """
    return {
        "fid": frechet_distance_from_features(generated.pooled, reference.pooled),
        "sfid": frechet_distance_from_features(generated.spatial, reference.spatial),
        "is": inception_score(generated.probabilities),
    }


def half_split_fid(features: np.ndarray, seeds: Iterable[int] = range(10)) -> float:
    """Mean Fréchet distance between two random halves of the real data: the unit of the paired increase.

    FID moves by tens of percent between seeds at a few hundred samples; the difference between a quantized
    model and its full-precision twin drawn from the same noise does not. Divided by this unit it can be
    compared between data sets and extractors.

    Args:
        features: [N, D] features of the real data, N >= 4; with odd N one row is left out of each split.
        seeds: one random split per seed.

    Raises:
        DataError: fewer than 4 rows, or no seeds.
    """
    features, seeds = np.asarray(features), list(seeds)
    half = len(features) // 2
    if half < 2 or not seeds:
        raise DataError(f"half splits need >= 4 rows and >= 1 seed, found {len(features)} and {len(seeds)}")
    distances = []
    for seed in seeds:
        order = np.random.default_rng(seed).permutation(len(features))
        first, second = features[order[:half]], features[order[half : 2 * half]]
        distances.append(frechet_distance_from_features(first, second))
    return float(np.mean(distances))
