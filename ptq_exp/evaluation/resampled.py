"""Fréchet distances of resamples to a reference that stays: what no resample changes is computed once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptq_exp.evaluation.metrics import (
    as_features,
    combined_distance,
    covariance_factor,
    mean_and_factor,
    same_dimension,
)
from ptq_exp.evaluation.statistics import FeatureStatistics, GaussianStatistics

Reference = FeatureStatistics | GaussianStatistics
OfRows = Callable[[np.ndarray], float]
"""Maps the rows of a resample, int64 [n], to a score of these images."""


def fid_of_rows(generated: FeatureStatistics, reference: Reference) -> OfRows:
    """Return the function that computes the FID of drawn rows of `generated`."""
    if isinstance(reference, FeatureStatistics):
        return FrechetOfRows(generated.pooled, *mean_and_factor(reference.pooled))
    return FrechetOfRows(generated.pooled, reference.mu, covariance_factor(reference.sigma, "sigma"))


def sfid_of_rows(generated: FeatureStatistics, reference: Reference) -> OfRows:
    """Return the function that computes the sFID of drawn rows of `generated`."""
    if isinstance(reference, FeatureStatistics):
        return FrechetOfRows(generated.spatial, *mean_and_factor(reference.spatial))
    return FrechetOfRows(generated.spatial, reference.mu_s, covariance_factor(reference.sigma_s, "sigma_s"))


class FrechetOfRows:
    """The squared Fréchet distance between the Gaussian of drawn rows of features and one that stays.

    With X the centred rows, each once and times the root of how often it was drawn, and F^T F the covariance that
    stays, the trace of the matrix square root (see `frechet_distance`) is the sum of the singular values of F X^T: the
    roots of the eigenvalues of the smaller one of two symmetric matrices. X F^T is made of rows that are multiplied by
    F^T before anything is drawn.

    Args:
        features: [N, D].
        mu: [D], mean of the Gaussian that stays.
        factor: F [r, D] of its covariance F^T F.

    Raises:
        DataError: not two-dimensional, fewer than two rows, different D, NaN or infinity.
    """

    def __init__(self, features: np.ndarray, mu: np.ndarray, factor: np.ndarray) -> None:
        x = as_features(features, "features")
        same_dimension(x.shape[1], len(mu), "features and mu")
        centre = x.mean(axis=0)
        self._x, self._offset, self._trace = x - centre, centre - mu, float(np.sum(factor**2))
        self._squares, self._projected = np.sum(self._x**2, axis=1), self._x @ factor.T

    def __call__(self, rows: np.ndarray) -> float:
        """Return the distance of `rows` [n], n >= 2, of which some may be the same."""
        drawn, counts = np.unique(rows, return_counts=True)
        n = len(rows)
        mean, projected = counts @ self._x[drawn] / n, self._projected[drawn]
        trace = (counts @ self._squares[drawn] - n * mean @ mean) / (n - 1)
        part = (projected - counts @ projected / n) * np.sqrt(counts / (n - 1))[:, None]
        eigenvalues = np.linalg.eigvalsh(part @ part.T if len(part) < part.shape[1] else part.T @ part)
        cross = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
        return combined_distance(self._offset + mean, trace, self._trace, cross)
