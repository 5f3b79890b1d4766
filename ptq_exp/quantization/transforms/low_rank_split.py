"""The parts of a weight: a product of two thin factors, and the rest, which is easier to round than the whole.

Li et al. 2024, "SVDQuant": W = L + R with L of a small rank; y = x L^T + Q(x) Q(R)^T. The largest singular values take
the outliers along, so that R has a smaller range. As R is rounded, L is fitted again to W - Q(R), and so on; the errors
of these iterations do not fall steadily, so that the best one is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from ptq_exp.errors import QuantizationError

Quantize = Callable[[Tensor], Tensor]
Judge = Callable[[Tensor, Tensor], float]
"""(branch weight, rounded residual), both [out, in] -> error."""


class LowRank(NamedTuple):
    """A weight [out, in] = up @ down + residual, with up [out, r] and down [r, in] of orthonormal rows."""

    up: Tensor
    down: Tensor
    residual: Tensor


@torch.no_grad()
def low_rank_split(
    weight: Tensor, rank: int, quantize: Quantize, iterations: int, *, error: Judge | None = None,
    patience: int | None = None,
) -> LowRank:
    """Split a weight [out, in] into factors of `rank` and a residual that `quantize` rounds with a small error.

    Iteration k: L_k = SVD_r(W - Q_{k-1}), Q_k = Q(W - L_k), Q_0 = 0; in float64. The last of the best ones is kept.

    Args:
        rank: of the product; at most the smaller side of the weight.
        quantize: residual [out, in] -> the same quantized and dequantized, by plain rounding.
        iterations: at most so many, 1 or more.
        error: what is to be small; None = the squared error of the weight, ||W - L - Q(W - L)||^2. That of the output
            on calibration inputs is the better judge.
        patience: iterations without a better one after which to stop; None = none of them.

    Returns:
        (up [out, r], down [r, in], residual [out, in]), float64; their factors are unique up to signs.

    Raises:
        QuantizationError: a size is impossible, or no iteration has a finite error.
    """
    whole = weight.detach().double()
    if whole.ndim != 2 or not 1 <= rank <= min(whole.shape) or iterations < 1:
        raise QuantizationError(
            f"low_rank_split: rank {rank} and {iterations} iterations do not suit a weight {list(whole.shape)}"
        )
    best, least, since = None, float("inf"), 0
    rounded = torch.zeros_like(whole)
    for _ in range(iterations):
        up, down = truncated(whole - rounded, rank)
        branch = up @ down
        rounded = quantize(whole - branch).double()
        now = float((whole - branch - rounded).square().sum()) if error is None else float(error(branch, rounded))
        if isfinite(now) and now <= least:
            best, least, since = LowRank(up, down, whole - branch), now, 0
        else:
            since += 1
        if patience is not None and since >= patience:
            break
    if best is None:
        raise QuantizationError("low_rank_split: no iteration has a finite error: the weight or an input has none")
    return best


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the first singular triplets of a matrix [out, in]: (u s [out, r], v^T [r, in])."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank]
