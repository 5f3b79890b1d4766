"""Is the residual of the correction Gaussian? A histogram per step, in units of its own standard deviation."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq_exp.correction.statistics import NoiseStatistics

EDGES = torch.linspace(-6.0, 6.0, 61)
"""Bins of a standardised residual; what lies outside is counted in the outermost ones."""


def residual_histogram(eps: Tensor, eps_q: Tensor, statistics: NoiseStatistics, step: int) -> Tensor:
    """Counts of (error - k eps - bias) / residual_std in the bins of `EDGES`, per sample, int64 [N, len(EDGES) - 1].

    Args:
        eps, eps_q: estimates of the same states [N, C, ...] at one `step`.
    """
    bias = statistics.bias[step].to(eps.device).view(1, -1, *[1] * (eps.ndim - 2))
    slope, std = float(statistics.slope[step]), float(statistics.residual_std[step])
    residual = ((eps_q - eps) - slope * eps - bias.to(eps.dtype)) / max(std, 1e-12)
    bins = len(EDGES) - 1
    width = float(EDGES[1] - EDGES[0])
    place = ((residual.flatten(1).float().cpu() - EDGES[0]) / width).floor().clamp(0, bins - 1).long()
    return torch.zeros(len(eps), bins, dtype=torch.long).scatter_add_(1, place, torch.ones_like(place))
