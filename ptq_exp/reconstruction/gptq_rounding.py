"""GPTQ: weights are rounded column by column, and the columns to come make up for each error.

Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", algorithm 1.
For a layer y = W x the squared error of y over all inputs is tr(E H E^T), E = W - Q, H = sum x x^T. With H = M M^T,
M upper triangular, it is the sum of the squares of E M, whose column j holds errors of the columns up to j alone: so
q_j is the level nearest to w_j + (sum over i < j of e_i M_ij) / M_jj. The published form, w_k -= (w_j - q_j) U_jk /
U_jj for all k > j with H^-1 = U^T U, is the same (U = M^-1) and needs the inverse.

Two more things differ from public code: ranges are those of the original weights (static groups), so that none is stale
and any order of columns needs no stored permutation; an input that was always zero keeps its nearest rounding.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ptq_exp.errors import DataError, QuantizationError
from ptq_exp.quantization.affine import SCALE_FLOOR, integer_range, symmetric_levels
from ptq_exp.reconstruction.gptq_grid import Elements, Levels, columns_first

LAZY = 128
"""Columns that take the errors of all earlier columns in one product; it changes no result."""
PANEL = 1024
"""Columns of one product of `objective`."""
LEAST_RETRY, RETRIES = 1e-3, 32
"""Where the factorization fails the damping doubles, from at least the first, at most so many times."""


class RoundedWeight(NamedTuple):
    """Outcome of `round_columns`.

    Attributes:
        levels: in units of the grid's scale, float64 [groups, out, in]: integers from the zero point, or elements.
        before, after: tr(E H E^T) of the nearest rounding and of this one, without damping.
        damping: share of the mean of the diagonal that was added to it in the end.
    """

    levels: Tensor
    before: float
    after: float
    damping: float


def gptq(
    weight: Tensor, hessian: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, *, act_order: bool = False,
    damping: float = 0.01,
) -> Tensor:
    """Round `weight` by GPTQ to ``scale * (q - zero_point)``, q an integer from 0 to 2^bits - 1.

    The signed grid of a symmetric weight, -2^(b-1)..2^(b-1)-1, is written with zero_point 2^(b-1); in terms of a
    `QRange` the zero point here is ``zero_point - qmin``. A `zero_point` of None, or of nothing but zeros, is the
    symmetric grid as `choose_qparams` makes it: signed, or all levels on one side for a group that lies on that side.
    There the level -2^(b-1) exists in groups that have a weight which is nearest to it; a scale of the largest
    magnitude over 2^(b-1) - 1 gives levels that lie symmetrically.

    Args:
        weight: [out, in], or of a convolution [out, in, *kernel].
        hessian: sum x x^T over all inputs (unfolded patches of a convolution), times any positive number; [in, in].
        scale, zero_point: [out, 1] per row, or [out, groups] for groups of equally many columns (the last one may be
            smaller); any shape that broadcasts to one of them. Ranges of the original weight.
        bits: 2 to 16.
        act_order: columns in the order of falling diagonal of `hessian`, rather than from left to right.
        damping: share of the mean of the diagonal that is added to it; raised where the factorization fails.

    Returns:
        The dequantized weight, in shape and type of `weight`.

    Raises:
        DataError: shapes do not fit, or a value is NaN or infinite.
        QuantizationError: `hessian` is no positive semi-definite matrix.
    """
    flat = weight.detach().flatten(1).double()[None]
    if hessian.shape != (flat.shape[2], flat.shape[2]):
        raise DataError(f"gptq: the Hessian is {list(hessian.shape)}, a weight {list(weight.shape)} needs "
                        f"[{flat.shape[2]}, {flat.shape[2]}]")
    grid = _grid(flat[0], scale, zero_point, bits)
    done = round_columns(flat, hessian.detach().to(flat)[None], grid, act_order=act_order, damping=damping)
    return (done.levels * grid.scale)[0].reshape(weight.shape).to(weight.dtype)


def _grid(weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Levels:
    """Return the grid that `gptq` is given in its own terms."""
    highest = integer_range(bits, signed=False)[1]
    rows, columns = weight.shape
    scale = torch.as_tensor(scale).to(weight).clamp(min=SCALE_FLOOR)
    zero = torch.zeros_like(scale) if zero_point is None else torch.as_tensor(zero_point).to(weight)
    groups = max((part.shape[1] if part.ndim > 1 else 1) for part in (scale, zero))
    size = -(-columns // groups)
    group = torch.arange(columns, device=weight.device) // size
    if int(group[-1]) + 1 != groups:
        raise DataError(f"gptq: {columns} columns are not {groups} groups of {size} columns")
    try:
        scale, zero = (part.expand(rows, groups)[:, group] for part in (scale, zero))
    except RuntimeError as error:
        raise DataError(f"gptq: scale {list(scale.shape)} and zero_point {list(zero.shape)} do not broadcast to "
                        f"[{rows}, {groups}]") from error
    if bool(zero.any()):
        return Levels(*(part[None] for part in (scale, -zero, highest - zero)))
    index = group.expand(rows, columns)
    ends = [torch.zeros(rows, groups).to(weight).scatter_reduce(1, index, weight, kind, include_self=False)[:, group]
            for kind in ("amin", "amax")]
    # what rounds to zero makes no group two-sided
    lo, hi = (torch.where(end.abs() <= scale / 2, 0, end) for end in ends)
    lowest, highest = (part.to(weight) for part in symmetric_levels(lo, hi, bits))
    # a scale of amax / (2^(b-1) - 1) is one of levels that lie symmetrically
    narrow = (lowest < 0) & (highest > 0) & ((lo / scale).round() > lowest)
    return Levels(scale[None], (lowest + narrow)[None], highest[None])


@torch.no_grad()
def round_columns(
    weight: Tensor, hessian: Tensor, grid: Levels | Elements, *, act_order: bool, damping: float
) -> RoundedWeight:
    """Round ``weight`` [groups, out, in] float64, with a Hessian [groups, in, in] for each group, see `gptq`.

    Raises:
        DataError: a value is NaN or infinite.
        QuantizationError: a Hessian is not positive semi-definite.
    """
    if not (bool(torch.isfinite(weight).all()) and bool(torch.isfinite(hessian).all())):
        raise DataError("gptq: the weight or the Hessian of its inputs holds NaN or infinity")
    before = objective(weight - grid.nearest(weight) * grid.scale, hessian)
    order = _last_first(hessian, act_order)
    lower, used = _factor(_permuted(hessian, order), damping)
    levels = _rounded(columns_first(weight, order), lower, grid.columns_first(order))
    levels = columns_first(levels.mT, order.argsort(dim=-1)).mT
    return RoundedWeight(levels, before, objective(weight - levels * grid.scale, hessian), used)


def objective(error: Tensor, hessian: Tensor) -> float:
    """Return tr(E H E^T), summed over groups: the squared error of the layer's output, E [groups, out, in].

    Products are taken in float32.
    """
    unit = hessian.diagonal(dim1=-2, dim2=-1).amax().clamp(min=torch.finfo(torch.float64).tiny)
    size = math.ldexp(1.0, math.frexp(float(error.abs().amax()))[1])  # a power of two changes no digit
    error, hessian = (error / size).float(), (hessian / unit).float()
    total = 0.0
    for start in range(0, error.shape[-1], PANEL):  # H is symmetric: what lies below the diagonal counts twice
        part, rest = error[..., start : start + PANEL], error[..., start + PANEL :]
        across = hessian[..., start : start + PANEL]
        own, below = across[..., start : start + PANEL, :], across[..., start + PANEL :, :]
        total += float(((part @ own + 2 * (rest @ below)) * part).sum(dtype=torch.float64))
    return total * float(unit) * size * size


def _rounded(weight: Tensor, lower: Tensor, grid: Levels | Elements) -> Tensor:
    """Return the levels of ``weight`` [groups, in, out], column by column of the layer, from the last to the first.

    Args:
        lower: L of H = L L^T, [groups, in, in]: the columns stand in reverse, so that M is lower triangular.
    """
    levels, errors = torch.empty_like(weight), torch.empty_like(weight)
    for end in range(weight.shape[1], 0, -LAZY):
        start = max(0, end - LAZY)
        carried = lower[:, end:, start:end].mT @ errors[:, end:]
        for j in range(end - 1, start - 1, -1):
            near = lower[:, j + 1 : end, j, None].mT @ errors[:, j + 1 : end]
            pull = (carried[:, j - start] + near[:, 0]) / lower[:, j, j, None]
            row = grid.row(j)
            levels[:, j] = row.nearest(weight[:, j] + pull)
            errors[:, j] = weight[:, j] - levels[:, j] * row.scale
    return levels


def _factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """Return the lower triangular L of the damped `hessian` (overwritten), L L^T, and the damping in the end."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.sum(-1, keepdim=True) / (diagonal != 0).sum(-1, keepdim=True).clamp(min=1)
    # an input that was always zero takes no part; public code lets it count as 1 in the mean, which depends on units
    diagonal += (diagonal == 0) * torch.where(mean > 0, mean, 1).clamp(max=1)
    undamped, mean = diagonal.clone(), diagonal.mean(-1, keepdim=True)
    for _ in range(RETRIES):
        diagonal.copy_(undamped + damping * mean)
        lower, info = torch.linalg.cholesky_ex(hessian)
        if not bool(info.any()) and bool(torch.isfinite(1 / lower.diagonal(dim1=-2, dim2=-1)).all()):
            return lower, damping
        damping = max(2 * damping, LEAST_RETRY)
    raise QuantizationError(f"gptq: the Hessian has no Cholesky factor, not even with a damping of {damping:g}")


def _last_first(hessian: Tensor, act_order: bool) -> Tensor:
    """Return the columns of each group, those that are rounded last first: int64 [groups, in]."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    if act_order:
        return diagonal.argsort(dim=-1, descending=True, stable=True).flip(-1)
    return torch.arange(diagonal.shape[-1], device=diagonal.device).flip(-1).expand(diagonal.shape)


def _permuted(hessian: Tensor, order: Tensor) -> Tensor:
    """Return a copy of the Hessians [groups, in, in] with rows and columns in `order` [groups, in]."""
    return torch.stack([part[index][:, index] for part, index in zip(hessian, order, strict=True)])
