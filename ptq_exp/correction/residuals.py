"""Test whether the residual of the correction is Gaussian and independent between steps, as its derivation assumes."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq_exp.correction.statistics import NoiseStatistics

EDGES = torch.linspace(-6.0, 6.0, 61)
"""Bins of a standardised residual; what lies outside is counted in the outermost ones."""


def standardised_residual(eps: Tensor, eps_q: Tensor, statistics: NoiseStatistics, step: int) -> Tensor:
    """(error - k eps - bias) / residual_std of estimates of the same states at one `step`, all [N, C, ...]."""
    bias = statistics.bias[step].to(eps.device, eps.dtype).view(1, -1, *[1] * (eps.ndim - 2))
    slope, std = float(statistics.slope[step]), float(statistics.residual_std[step])
    return ((eps_q - eps) - slope * eps - bias) / max(std, 1e-12)


def residual_histogram(residual: Tensor) -> Tensor:
    """Count standardised residuals [N, ...] in the bins of `EDGES`, per sample, int64 [N, len(EDGES) - 1]."""
    bins = len(EDGES) - 1
    width = float(EDGES[1] - EDGES[0])
    place = ((residual.flatten(1).float().cpu() - EDGES[0]) / width).floor().clamp(0, bins - 1).long()
    return torch.zeros(len(residual), bins, dtype=torch.long).scatter_add_(1, place, torch.ones_like(place))


def step_products(residual: Tensor, before: Tensor | None) -> Tensor:
    """Mean of r^2 and of r r' over channels and pixels, r' the residual of the step before (0 without), [N, 2]."""
    r = residual.double().flatten(1)
    previous = torch.zeros_like(r) if before is None else before.double().flatten(1)
    return torch.stack([(r * r).mean(1), (r * previous).mean(1)], 1).cpu()


def step_correlation(products: Tensor) -> Tensor:
    """Correlation of the residuals of each step with those of the step before, [S - 1].

    PTQD's variance correction is exact for independent ones (0); where they are alike (1), errors add up along the
    trajectory, and no noise that a sampler leaves out can balance them.

    Args:
        products: of all samples and steps, [N, S, 2]; see `step_products`.
    """
    square, product = products.double().mean(0).unbind(1)
    scale = (square[1:] * square[:-1]).sqrt()
    return torch.where(scale > 0, product[1:] / scale, 0.0)
