"""Kernel Inception Distance of two sets of features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptq_exp.evaluation.metrics import as_features, same_dimension

if TYPE_CHECKING:
    from ptq_exp.evaluation.metrics import Array


def kernel_distance(a: Array, b: Array, subsets: int = 100, subset_size: int = 1000, seed: int = 2020) -> float:
    """Kernel Inception Distance (Bińkowski et al. 2018): unbiased squared MMD under k(x, y) = (x·y / D + 1)^3.

    The mean over random subsets of either set, of `subset_size` rows or as many as the smaller set has (as clean-fid
    does), drawn with the generator and the seed of torch-fidelity.

    Args:
        a: [N1, D] features, N1 >= 2.
        b: [N2, D] features, N2 >= 2.

    Returns:
        A value that may be slightly negative: the estimate is unbiased.

    Raises:
        DataError: not two-dimensional, fewer than two rows, different D, NaN or infinity.
    """
    a, b = as_features(a, "a"), as_features(b, "b")
    same_dimension(a.shape[1], b.shape[1], "a and b")
    size = min(len(a), len(b), subset_size)
    if size == len(a) == len(b):  # every subset is the whole, and the order of rows does not matter
        return _squared_mmd(a, b)
    rng = np.random.RandomState(seed)
    draws = ((rng.choice(len(a), size, replace=False), rng.choice(len(b), size, replace=False)) for _ in range(subsets))
    return float(np.mean([_squared_mmd(a[rows_a], b[rows_b]) for rows_a, rows_b in draws]))


def _squared_mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Return the unbiased estimate for two sets of n rows: pairs of a row with itself are left out."""
    n = len(a)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        base = x @ y.T / x.shape[1] + 1
        return base * base * base

    within = sum(k.sum() - np.trace(k) for k in (kernel(a, a), kernel(b, b)))
    return float(within / (n * (n - 1)) - 2 * kernel(a, b).mean())
