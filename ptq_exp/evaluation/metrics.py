"""IS and FID as pure functions of class probabilities and features, computed in float64.

Both follow the evaluator of guided diffusion (Dhariwal & Nichol 2021): consecutive chunks for the Inception
Score, unbiased covariance (`ddof=1`) for the Fréchet distance. sFID is the Fréchet distance of spatial
features. The trace of the matrix square root is the sum of singular values of a product of factors, never
`scipy.linalg.sqrtm`: faster, and as exact where a covariance is singular.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg
from scipy.special import xlogy

from ptq_exp.errors import DataError

if TYPE_CHECKING:  # torch takes seconds to load, and is not needed to read a table of scores
    import torch

    Array = np.ndarray | torch.Tensor

# How far a row of float32 softmax outputs may be from summing to 1, and how far (relative to its largest
# values) a float32 covariance from being positive semi-definite, before the input is not what it should be.
_ROW_SUM_TOLERANCE = 1e-3
_COVARIANCE_TOLERANCE = 1e-5


def inception_score(probabilities: Array, chunk: int = 5000) -> float:
    """Inception Score (Salimans et al. 2016): mean over chunks of exp(mean KL(p(y|x) || p(y))).

    Args:
        probabilities: [N, C] softmax outputs, each row sums to 1.
        chunk: images per chunk, taken in order; the last, shorter chunk counts as much as the others.

    Returns:
        A value in [1, C].

    Raises:
        DataError: not two-dimensional, no rows, NaN or infinity, negative values, rows that do not sum to 1,
            chunk < 1.
    """
    p = _as_float64(probabilities, "probabilities", ndim=2)
    if len(p) == 0:
        raise DataError("inception_score needs at least one image, found none")
    if chunk < 1:
        raise DataError(f"inception_score needs chunk >= 1, found {chunk}")
    worst = np.abs(p.sum(axis=1) - 1).max()
    if p.min() < 0 or worst > _ROW_SUM_TOLERANCE:
        raise DataError(
            f"inception_score expects softmax outputs; found values from {p.min():.3g} to {p.max():.3g} "
            f"and a row sum {worst:.3g} away from 1 (were logits passed?)"
        )
    return float(np.mean([_chunk_score(p[start : start + chunk]) for start in range(0, len(p), chunk)]))


def _chunk_score(p: np.ndarray) -> float:
    """exp of the mean KL divergence between the rows of p and their mean, with 0 log 0 = 0."""
    marginal = p.mean(axis=0)
    kl = xlogy(p, p).sum(axis=1) - xlogy(p, marginal).sum(axis=1)
    return float(np.exp(kl.mean()))


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """Squared Fréchet distance between two Gaussians (Heusel et al. 2017, eq. 6).

    |mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^(1/2)). With sigma1 = F^T F (Cholesky, with
    pivoting where sigma1 is singular) the last trace is the sum of the square roots of the eigenvalues of the
    symmetric F sigma2 F^T, which has the non-zero spectrum of sigma1 sigma2.

    Args:
        mu1, mu2: [D] means.
        sigma1, sigma2: [D, D] covariances, symmetric and positive semi-definite.

    Returns:
        A value >= 0 (rounding below zero is cut off).

    Raises:
        DataError: shapes that do not fit, NaN or infinity, a matrix that is no covariance.
    """
    mu1, mu2 = _as_float64(mu1, "mu1", ndim=1), _as_float64(mu2, "mu2", ndim=1)
    sigma1, sigma2 = _as_covariance(sigma1, "sigma1"), _as_covariance(sigma2, "sigma2")
    same_dimension(len(mu1), len(mu2), "mu1 and mu2")
    same_dimension(len(mu1), len(sigma1), "mu1 and sigma1")
    same_dimension(len(mu2), len(sigma2), "mu2 and sigma2")

    try:
        # the generalized problem of type 2 is that of F sigma2 F^T, and reduces it in half the time
        eigenvalues = scipy.linalg.eigvalsh(sigma2, sigma1, type=2, driver="gv", check_finite=False)
    except np.linalg.LinAlgError:
        factor = _pivoted_cholesky(sigma1, "sigma1")
        eigenvalues = np.linalg.eigvalsh(factor @ sigma2 @ factor.T)
    if np.min(eigenvalues, initial=0) < -_COVARIANCE_TOLERANCE * np.max(np.abs(eigenvalues), initial=0):
        raise DataError("sigma2 has a negative eigenvalue, so it is no covariance matrix")
    cross = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    return combined_distance(mu1 - mu2, np.trace(sigma1), np.trace(sigma2), cross)


def frechet_distance_from_features(a: Array, b: Array) -> float:
    """Squared Fréchet distance between Gaussians fitted to two feature sets (covariances with ddof=1).

    With fewer rows than columns the D x D covariances are never formed: with A and B the centred features
    over sqrt(N - 1), tr((A^T A B^T B)^(1/2)) is the sum of the singular values of A B^T, at most [N1, N2].

    Args:
        a: [N1, D] features, N1 >= 2.
        b: [N2, D] features, N2 >= 2.

    Raises:
        DataError: not two-dimensional, fewer than two rows, different D, NaN or infinity.
    """
    a, b = as_features(a, "a"), as_features(b, "b")
    same_dimension(a.shape[1], b.shape[1], "a and b")
    mu_a, mu_b = a.mean(axis=0), b.mean(axis=0)
    if min(len(a), len(b)) > a.shape[1]:
        return frechet_distance(mu_a, _covariance(a, mu_a), mu_b, _covariance(b, mu_b))
    factor_a, factor_b = _factor(a, mu_a), _factor(b, mu_b)
    cross = np.linalg.svd(factor_a @ factor_b.T, compute_uv=False).sum()
    return combined_distance(mu_a - mu_b, np.sum(factor_a**2), np.sum(factor_b**2), cross)


def mean_and_covariance(features: Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the Gaussian of features [N, D], N >= 2: mean [D] and covariance [D, D] (ddof=1), float64.

    Raises:
        DataError: not two-dimensional, fewer than two rows, NaN or infinity.
    """
    x = as_features(features, "features")
    mu = x.mean(axis=0)
    return mu, _covariance(x, mu)


def mean_and_factor(features: Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean [D] of features [N, D], and F [min(N, D), D] with F^T F = their covariance (ddof=1).

    Raises:
        DataError: as `mean_and_covariance`.
    """
    x = as_features(features, "features")
    mu = x.mean(axis=0)
    return mu, _factor(x, mu)


def covariance_factor(sigma: Array, name: str) -> np.ndarray:
    """Return F [rank, D] with F^T F = sigma [D, D].

    Raises:
        DataError: sigma is no covariance matrix; the message begins with `name`.
    """
    sigma = _as_covariance(sigma, name)
    try:
        return np.linalg.cholesky(sigma).T
    except np.linalg.LinAlgError:  # singular, which it may be
        return _pivoted_cholesky(sigma, name)


def _covariance(x: np.ndarray, mu: np.ndarray) -> np.ndarray:
    """Unbiased covariance [D, D] of x [N, D]."""
    centred = x - mu
    return centred.T @ centred / (len(x) - 1)


def _factor(x: np.ndarray, mu: np.ndarray) -> np.ndarray:
    """F [min(N, D), D] with F^T F = cov(x)."""
    centred = (x - mu) / np.sqrt(len(x) - 1)
    return np.linalg.qr(centred, mode="r") if len(x) > x.shape[1] else centred


def require_covariance(sigma: Array, name: str) -> None:
    """Nothing, if `sigma` [D, D] is the covariance of something: symmetric, no negative eigenvalue, not 0 everywhere.

    Raises:
        DataError: it is none; the message begins with `name`.
    """
    sigma = _as_covariance(sigma, name)
    if np.min(np.diagonal(sigma), initial=0) < -_COVARIANCE_TOLERANCE * np.max(np.abs(sigma), initial=0):
        raise DataError(f"{name} has a negative variance, so it is no covariance matrix")
    if not sigma.any():
        raise DataError(f"{name} is 0 everywhere, so it is the covariance of no set of images")
    covariance_factor(sigma, name)


def combined_distance(mean_difference: np.ndarray, trace1: float, trace2: float, cross: float) -> float:
    """Return the sum of the four terms of the distance; the true value is never negative, its rounding may be."""
    return max(0.0, float(mean_difference @ mean_difference + trace1 + trace2 - 2 * cross))


def _as_float64(x: Array, name: str, ndim: int) -> np.ndarray:
    """Array or tensor (any device, any float type) as a finite float64 numpy array of `ndim` dimensions."""
    if hasattr(x, "detach"):
        x = x.detach().cpu().double().numpy()
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != ndim:
        raise DataError(f"{name} must have {ndim} dimension(s), found shape {x.shape}")
    if not np.isfinite(x).all():
        raise DataError(f"{name} of shape {x.shape} holds {np.sum(~np.isfinite(x))} NaN or infinite value(s)")
    return x


def as_features(x: Array, name: str) -> np.ndarray:
    """Return features [N, D], N >= 2, as float64 numpy; anything else is a DataError that begins with `name`."""
    x = _as_float64(x, name, ndim=2)
    if len(x) < 2:
        raise DataError(f"features {name} need at least 2 rows for a covariance, found {len(x)}")
    return x


def _as_covariance(sigma: Array, name: str) -> np.ndarray:
    sigma = _as_float64(sigma, name, ndim=2)
    if sigma.shape[0] != sigma.shape[1]:
        raise DataError(f"{name} must be square, found shape {sigma.shape}")
    if not scipy.linalg.issymmetric(sigma):  # exact, and fast
        asymmetry = np.abs(sigma - sigma.T).max() / np.abs(sigma).max()
        if asymmetry > _COVARIANCE_TOLERANCE:
            raise DataError(f"{name} is not symmetric, so it is no covariance matrix")
    return sigma


def _pivoted_cholesky(sigma: np.ndarray, name: str) -> np.ndarray:
    """F [rank, D] with F^T F = sigma for a singular matrix: stops where only rounding is left.

    The matrix is first scaled to unit diagonal: features of small variance are not taken for rounding.

    Raises:
        DataError: sigma has a negative eigenvalue beyond rounding.
    """
    variances = np.diagonal(sigma)
    scale = np.sqrt(np.where(variances > 0, variances, 1))
    correlation = sigma / scale / scale[:, None]
    upper, pivots, rank, _ = scipy.linalg.lapack.dpstrf(correlation, lower=0)
    factor = np.empty((rank, len(sigma)))
    factor[:, pivots - 1] = np.triu(upper[:rank])
    rest = pivots[rank:] - 1
    missing = correlation[np.ix_(rest, rest)] - factor[:, rest].T @ factor[:, rest]
    if np.max(np.abs(missing), initial=0) > _COVARIANCE_TOLERANCE:
        raise DataError(f"{name} has a negative eigenvalue, so it is no covariance matrix")
    return factor * scale


def same_dimension(first: int, second: int, names: str) -> None:
    """Raise DataError if the features called `names` have different dimensions."""
    if first != second:
        raise DataError(f"{names} must have the same feature dimension, found {first} and {second}")
