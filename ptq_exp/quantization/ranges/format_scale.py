"""Scale of a floating-point format: that of the largest magnitude, or a smaller one with less error."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq_exp.errors import QuantizationError
from ptq_exp.quantization.formats import FloatFormat
from ptq_exp.quantization.ranges.elementwise import HistogramMetric, Loss
from ptq_exp.quantization.ranges.histogram import describe, finite_ends
from ptq_exp.quantization.ranges.range_search import METRICS, PERCENTILE, RangeSketch, nearest_rank

SHRINKS = tuple(2 ** (-k / 8) for k in range(17))
"""Shares of the largest magnitude that are tried as the largest value; a power of two less changes small values only
where they are below the normal numbers."""


@torch.no_grad()
def search_scale(rows: Tensor, made: FloatFormat, metric: str, name: str | None = None) -> Tensor:
    """Return a scale for each row of `rows` [R, n], float32 [R].

    Args:
        metric: of `METRICS`; `minmax` keeps the largest magnitude, `percentile` that of its rank; those that are no
            mean of losses take `mse`.
        name: layer to name in an error.

    Raises:
        QuantizationError: `rows` hold NaN or infinity.
    """
    if rows.numel() == 0:
        raise QuantizationError(f"{describe(name)}: found an empty tensor of shape {list(rows.shape)}")
    rows = rows.float()
    low, high = finite_ends(rows, name)
    amax = torch.maximum(high, -low)
    if metric == "percentile":
        amax = nearest_rank(rows.abs())
    return _least(rows, None, amax, made, metric)


@torch.no_grad()
def sketch_scale(sketch: RangeSketch, made: FloatFormat, metric: str) -> Tensor:
    """Return the scale of what a sketch of one cell saw, float32 [1]; arguments as in `search_scale`."""
    low, high = sketch.percentile(PERCENTILE) if metric == "percentile" else (sketch.min, sketch.max)
    first, counts = sketch.occupied()
    centres = (first + torch.arange(counts.shape[1], device=counts.device) + 0.5) * sketch.width
    weights = counts.double() / counts.sum().clamp(min=1)
    return _least(centres.float(), weights, torch.maximum(high, -low), made, metric)


def _least(points: Tensor, weights: Tensor | None, amax: Tensor, made: FloatFormat, metric: str) -> Tensor:
    """Return the scale of least mean loss over `points` [R, n], [R]."""
    whole = amax / made.largest
    loss = _loss(metric)
    if loss is None:
        return whole
    best, least = whole, torch.full_like(whole, torch.inf, dtype=torch.float64)
    for shrink in SHRINKS:
        scale = torch.where(whole > 0, whole * shrink, 1.0)
        errors = points - made.cast(points / scale[:, None]) * scale[:, None]
        lost = loss(errors).double()
        mean = lost.mean(1) if weights is None else (lost * weights).sum(1)
        best, least = torch.where(mean < least, whole * shrink, best), torch.minimum(mean, least)
    return best


def _loss(metric: str) -> Loss | None:
    if metric in ("minmax", "percentile"):
        return None
    own = METRICS[metric]
    return METRICS["mse"] if own is None or isinstance(own, HistogramMetric) else own
