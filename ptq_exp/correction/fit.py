"""Fit the statistics of quantization noise to paired noise estimates, or to their moments."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ptq_exp.correction.moments import Chunk, Merged, at, pooled, residual_moment, sample_moments
from ptq_exp.correction.shrinkage import bias_stderr, shrunk_slope, slope_stderr, trusted
from ptq_exp.correction.statistics import CONVENTIONS, NoiseStatistics
from ptq_exp.errors import ConfigError, DataError
from ptq_exp.storage.pieces import slices

_CHUNK = 64


def fit_statistics(
    eps_fp: Tensor, eps_q: Tensor, step: Tensor, n_steps: int, convention: str = "paper", *, shrink: bool = False
) -> NoiseStatistics:
    """Fit the statistics of every step from paired noise estimates on the same states.

    Args:
        eps_fp: full-precision estimates [N, C, H, W], after guidance.
        eps_q: quantized estimates of the same states [N, C, H, W].
        step: position of each pair in the time grid, int64 [N], 0..n_steps-1.
        n_steps: length S of the grid.
        convention: "paper" (bias of the uncorrelated part, pooled variance) or "code" (PTQD's published
            `analyze_error`: bias of the raw error, mean of the samples' deviations).
        shrink: pull slopes and biases towards 0 as far as they are not significant; see `fit_moments`.

    Raises:
        DataError: shapes differ, values are not finite, or a step has no pair.
        ConfigError: an unknown convention.
    """
    step = torch.as_tensor(step, dtype=torch.long)
    if step.shape != eps_fp.shape[:1]:
        raise DataError(f"step must hold one position for each of {len(eps_fp)} estimates, found {tuple(step.shape)}")
    # float64 powers of one chunk at a time; the moments themselves are small
    chunks = [(step[rows], sample_moments(eps_fp[rows], eps_q[rows])) for rows in slices(len(step), _CHUNK)]
    return fit_moments(chunks, n_steps, eps_fp[0, 0].numel() if len(eps_fp) else 1, convention, shrink=shrink)


def fit_moments(
    chunks: Iterable[Chunk], n_steps: int, pixels: int, convention: str = "paper", *,
    correlation: bool = True, bias: bool = True, shrink: bool = False, repeats: Tensor | None = None,
) -> NoiseStatistics:
    """Fit the statistics from moments, which are read several times, a chunk in memory at a time.

    Args:
        chunks: re-iterable of (step [N], moments [N, C, M]); see `ptq_exp.correction.moments`.
        n_steps: S.
        pixels: per channel of an estimate.
        convention: see `fit_statistics`.
        correlation, bias: False = that part is not corrected: its statistics are 0, and the others are those of an
            error from which it was not taken.
        shrink: multiply slopes and biases by max(0, 1 - (standard error / value)^2), which minimises their expected
            error, and keep negative slopes from amplifying the residual; see `ptq_exp.correction.shrinkage`.
        repeats: int64 [S], for each position the first one with the same network time (`TimeGrid.first_with_time`);
            such positions share one network and are fitted together. None = all differ.

    Raises:
        DataError: a step has no samples.
        ConfigError: an unknown convention.
    """
    if convention not in CONVENTIONS:
        raise ConfigError(f"correction.convention={convention}: choose one of {', '.join(CONVENTIONS)}")
    if repeats is not None:
        chunks = Merged(chunks, repeats)
    moments, counts = pooled(chunks, n_steps)
    used = torch.arange(n_steps) if repeats is None else repeats
    if bool((empty := counts[used] == 0).any()):
        raise DataError(
            f"no noise estimates for the steps {torch.nonzero(empty).flatten().tolist()} of {n_steps}: every step "
            "needs some, on the grid that will be sampled with"
        )
    ols, r = _regression(moments)
    stderr = slope_stderr(chunks, moments, counts, ols)
    k = torch.zeros_like(ols) if not correlation else ols
    if shrink and correlation:
        k = shrunk_slope(moments, ols, stderr)
    removed = k.clamp(min=0) if convention == "code" else k
    means = residual_moment(moments, 1, removed.view(-1, 1), torch.zeros(()))
    raw_means = at(moments, 0, 1) if convention == "code" else means
    bias_error = bias_stderr(chunks, raw_means, counts, removed if convention == "paper" else torch.zeros_like(k))
    channel_bias = trusted(raw_means, bias_error) if shrink else raw_means
    variance = residual_moment(moments, 2, removed.view(-1, 1), means).mean(1)
    fourth = residual_moment(moments, 4, removed.view(-1, 1), means).mean(1)
    code = convention == "code"
    fitted = NoiseStatistics(
        k=k,
        bias=channel_bias if bias else torch.zeros_like(channel_bias),
        residual_std=_mean_deviation(chunks, counts, removed, pixels) if code else variance.clamp(min=0).sqrt(),
        r=r,
        kurtosis=torch.where(variance > 0, fourth / variance**2 - 3, 0.0),
        k_stderr=stderr,
        bias_stderr=bias_error,
        k_unshrunk=ols,
        counts=counts,
        convention=convention,
    )
    return fitted if repeats is None else fitted.at_steps(repeats)


def mean_square_error(chunks: Iterable[Chunk], n_steps: int, statistics: NoiseStatistics | None = None) -> Tensor:
    """Mean of (eps' - eps)^2 over samples, channels and pixels of each step, float64 [S].

    eps' = (eps_q - bias) / (1 + slope), so that eps' - eps = (error - slope eps - bias) / (1 + slope); without
    `statistics`, eps' = eps_q.
    """
    moments, _ = pooled(chunks, n_steps)
    if statistics is None:
        return at(moments, 0, 2).mean(1)
    slope = statistics.slope
    return residual_moment(moments, 2, slope.view(-1, 1), statistics.bias).mean(1).clamp(min=0) / (1 + slope) ** 2


def relative_error(chunks: Iterable[Chunk], n_steps: int, statistics: NoiseStatistics | None = None) -> Tensor:
    """||eps' - eps|| / ||eps|| of each step over all samples, float64 [S]; see `mean_square_error`."""
    moments, _ = pooled(chunks, n_steps)
    return (mean_square_error(chunks, n_steps, statistics) / at(moments, 2, 0).mean(1)).sqrt()


def _regression(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Slope of the least-squares line of error on eps over all channels and pixels, and r, both [S]."""
    x, e = at(moments, 1, 0).mean(1), at(moments, 0, 1).mean(1)
    xx = at(moments, 2, 0).mean(1) - x**2
    ee = at(moments, 0, 2).mean(1) - e**2
    xe = at(moments, 1, 1).mean(1) - x * e
    k = torch.where(xx > 0, xe / xx, 0.0)
    return k, torch.where((xx > 0) & (ee > 0), xe / (xx * ee).clamp(min=0).sqrt(), 0.0)


def _mean_deviation(chunks: Iterable[Chunk], counts: Tensor, k: Tensor, pixels: int) -> Tensor:
    """Mean over samples of the unbiased standard deviation of error - k eps over channels and pixels, [S]."""
    total = torch.zeros_like(k)
    for step, moments in chunks:
        slope, zero = k[step].view(-1, 1), torch.zeros(())
        mean = residual_moment(moments, 1, slope, zero).mean(1)
        variance = residual_moment(moments, 2, slope, zero).mean(1) - mean**2
        values = pixels * moments.shape[1]
        total.index_add_(0, step, (variance.clamp(min=0) * values / max(values - 1, 1)).sqrt())
    return total / counts
