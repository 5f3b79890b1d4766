"""How far an estimated slope or bias can be trusted, and how far it is pulled towards 0 where it cannot.

An estimate v with standard error s is multiplied by max(0, 1 - (s / v)^2): of all factors this one minimises the
expected squared error of the corrected estimate, with v^2 - s^2 for the unknown square of the true value (positive-part
James-Stein in one dimension). It is 1 for a sure value and 0 for one below its own standard error.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ptq_exp.correction.moments import Chunk, at, residual_moment


def slope_stderr(chunks: Iterable[Chunk], moments: Tensor, counts: Tensor, k: Tensor) -> Tensor:
    """Estimate the standard error of each step's slope [S] from the scatter between samples.

    Cluster-robust (Liang and Zeger 1986).

    Args:
        chunks: moments of the samples, see `MomentChunks`.
        moments: pooled [S, C, M].
        counts: samples per step [S]; the standard error of a single sample is infinite.
        k: slopes [S].
    """
    x, e = at(moments, 1, 0).mean(1), at(moments, 0, 1).mean(1)
    variance = at(moments, 2, 0).mean(1) - x**2
    squares = torch.zeros_like(k)
    for step, own in chunks:
        of_x, of_e = at(own, 1, 0).mean(1), at(own, 0, 1).mean(1)
        mean_x, mean_e = x[step], e[step]
        xe = at(own, 1, 1).mean(1) - mean_x * of_e - mean_e * of_x + mean_x * mean_e
        xx = at(own, 2, 0).mean(1) - 2 * mean_x * of_x + mean_x**2
        squares.index_add_(0, step, (xe - k[step] * xx) ** 2)
    return _of_mean(squares, counts) / variance


def bias_stderr(chunks: Iterable[Chunk], means: Tensor, counts: Tensor, k: Tensor) -> Tensor:
    """Estimate the standard error [S, C] of the `means` [S, C] of error - k eps from the samples' own means."""
    squares = torch.zeros_like(means)
    for step, own in chunks:
        of_sample = residual_moment(own, 1, k[step].view(-1, 1), torch.zeros(()))
        squares.index_add_(0, step, (of_sample - means[step]) ** 2)
    return _of_mean(squares, counts.view(-1, 1))


def shrunk_slope(moments: Tensor, k: Tensor, stderr: Tensor) -> Tensor:
    """Slopes [S] pulled towards 0 by their uncertainty; negative ones also by the noise that they would amplify.

    A correction divides by 1 + k. With k < 0 that enlarges the residual, of variance R, and the mean squared error
    ((k - k')^2 X + R) / (1 + k')^2 of an estimate of variance X is least at k' = k + R / (X (1 + k)): negative slopes
    go up to there, at most to 0. At k <= -1 the quantized estimate carries nothing of the other: 0.
    """
    safe = trusted(k, stderr)
    x = (at(moments, 2, 0) - at(moments, 1, 0) ** 2).mean(1)
    centre = residual_moment(moments, 1, safe.view(-1, 1), torch.zeros(()))
    residual = residual_moment(moments, 2, safe.view(-1, 1), centre).mean(1)
    least = torch.where((safe > -1) & (x > 0), safe + residual / (x * (1 + safe)), 0.0)
    return torch.where(safe < 0, least.clamp(max=0), safe)


def trusted(value: Tensor, stderr: Tensor) -> Tensor:
    """Multiply estimates by max(0, 1 - (standard error / value)^2), of the same shape."""
    factor = 1 - (stderr / value) ** 2
    return value * torch.where(value == 0, 0.0, factor.nan_to_num(0.0, neginf=0.0).clamp(min=0))


def _of_mean(squares: Tensor, counts: Tensor) -> Tensor:
    """Estimate the standard error of a mean from the sum of squared deviations; infinite for one sample."""
    return torch.where(counts > 1, (squares / (counts * (counts - 1)).clamp(min=1)).sqrt(), torch.inf)
