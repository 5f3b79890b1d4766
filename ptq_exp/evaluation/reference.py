"""Scores of generated images against a reference, and the unit of the paired increase."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ptq_exp.errors import DataError
from ptq_exp.evaluation.manifold import precision_recall
from ptq_exp.evaluation.metrics import (
    frechet_distance,
    frechet_distance_from_features,
    inception_score,
    mean_and_covariance,
)
from ptq_exp.evaluation.statistics import FeatureStatistics, GaussianStatistics, require_same_features

__all__ = ["FeatureStatistics", "GaussianStatistics", "half_split_fid", "score"]

_NEIGHBOUR = 3


def score(
    generated: FeatureStatistics,
    reference: FeatureStatistics | GaussianStatistics,
    *,
    with_precision_recall: bool = True,
) -> dict[str, float]:
    """FID, sFID (lower is better), IS, precision and recall (higher is better) of generated images.

    Stored Gaussians are used for FID and sFID where the reference has them, its features for precision and recall,
    as the evaluator of guided diffusion does.

    Args:
        generated: features of the generated images.
        reference: features or Gaussians of the real images, from the same extractor.
        with_precision_recall: False saves their time, which grows with the product of the numbers of images.

    Returns:
        {"fid", "is"} and, where the reference has what they need, {"sfid"} and {"precision", "recall"}; these two need
        more than 3 images on either side. IS does not depend on the reference.

    Raises:
        DataError: the two come from different extractors, or hold NaN or infinity.
    """
    require_same_features(generated, reference)
    values = _frechet_distances(generated, reference) | {"is": inception_score(generated.probabilities)}
    real = reference if isinstance(reference, FeatureStatistics) else reference.features
    if with_precision_recall and real is not None and min(len(real), len(generated)) > _NEIGHBOUR:
        precision, recall = precision_recall(real.pooled, generated.pooled, _NEIGHBOUR)
        values |= {"precision": precision, "recall": recall}
    return values


def _frechet_distances(
    generated: FeatureStatistics, reference: FeatureStatistics | GaussianStatistics
) -> dict[str, float]:
    if isinstance(reference, FeatureStatistics):
        return {
            "fid": frechet_distance_from_features(generated.pooled, reference.pooled),
            "sfid": frechet_distance_from_features(generated.spatial, reference.spatial),
        }
    # the reference first: the route through its Cholesky factor needs it to be of full rank, which it usually is
    distances = {"fid": frechet_distance(reference.mu, reference.sigma, *mean_and_covariance(generated.pooled))}
    if reference.mu_s is not None:
        gaussian = mean_and_covariance(generated.spatial)
        distances["sfid"] = frechet_distance(reference.mu_s, reference.sigma_s, *gaussian)
    return distances


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
