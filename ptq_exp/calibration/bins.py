"""Bins of sampling steps: which steps share their activation ranges (Huang et al. 2024, "TFMQ-DM", section 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq_exp.diffusion import TimeGrid
from ptq_exp.errors import ConfigError, DataError

TEMPORAL = ("static", "binned", "per_step")


def time_bins(grid: TimeGrid, temporal: str, n_bins: int = 1) -> Tensor:
    """Return the bin of each step of `grid`, int64 [S], numbered from 0 in the order of sampling without gaps.

    Steps of one network time are in one bin: the network sees nothing but the time.

    Args:
        temporal: `static`, one bin; `binned`, `n_bins` bins of consecutive steps, as equal as can be; `per_step`.

    Raises:
        ConfigError: more bins than steps, none, or an unknown `temporal`.
    """
    steps = len(grid)
    if temporal not in TEMPORAL:
        raise ConfigError(f"quantization.temporal={temporal}: choose one of {', '.join(TEMPORAL)}")
    if temporal == "binned" and not 1 <= n_bins <= steps:
        raise ConfigError(f"quantization.temporal_bins={n_bins}: choose 1..{steps}, the number of sampling steps")
    bins = {"static": 1, "binned": n_bins, "per_step": steps}[temporal]
    of_step = torch.arange(steps) * bins // steps
    return of_step[grid.first_with_time].unique(return_inverse=True)[1]


def check_bins(bins: Tensor, steps: Tensor) -> None:
    """Raise DataError unless the calibration states of `steps` [N] leave no bin of `bins` [S] empty."""
    counts = torch.bincount(bins[steps], minlength=int(bins.max()) + 1)
    empty = [int(bin_) for bin_ in (counts == 0).nonzero().flatten()]
    if empty:
        raise DataError(
            f"quantization.temporal: {len(empty)} of {len(counts)} bins of sampling steps have no calibration state "
            f"(first: step {int((bins == empty[0]).nonzero()[0])}): choose calibration=uniform, raise "
            f"calibration.n_samples={len(steps)}, or lower quantization.temporal_bins"
        )
