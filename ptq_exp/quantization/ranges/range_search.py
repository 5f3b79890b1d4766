"""Range search: the quantizer of given bits that minimises a metric between data and its quantized self.

Metrics, x the data and q its quantized self: `mse` mean (x - q)^2; `l1` mean |x - q|; `lp` mean |x - q|^2.4;
`cosine` 1 - <x, q> / (|x| |q|); `kl` divergence of two histograms, see `CodeDivergence` (with few values per
quantizer and many bits it is zero for any range and leaves the data's own); `minmax` the range of the data,
nothing clipped; `percentile` the range that holds 99.99 % of the values on either side. Others are added to `METRICS`.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from ptq_exp.errors import ConfigError, QuantizationError
from ptq_exp.quantization.affine import QRange, choose_qparams, integer_range
from ptq_exp.quantization.ranges.elementwise import ElementwiseErrors, HistogramMetric, Loss, check_loss
from ptq_exp.quantization.ranges.histogram import Histogram, describe, finite_ends
from ptq_exp.quantization.ranges.metrics import (
    EXPONENTS,
    CodeDivergence,
    ErrorSource,
    HistogramErrors,
    ValueErrors,
    power_,
)
from ptq_exp.quantization.ranges.search import GridSpace, search_grid

_LOSSES: dict[str, Loss] = {name: partial(power_, p=p) for name, p in EXPONENTS.items()}
METRICS: dict[str, Loss | HistogramMetric | None] = {
    "mse": _LOSSES["mse"], "l1": _LOSSES["l1"], "cosine": None, "kl": None, "lp": _LOSSES["lp"], "minmax": None,
    "percentile": None,
}
"""Name -> loss of the error x - q, whose mean is minimised; None for metrics that are no such mean.

Add your own loss (see `Loss`), or a `HistogramMetric`. Means of powers have closed forms here, and the same minimum."""
PERCENTILE = 0.9999
SKETCH_BINS = 8192
MOST_KL_BINS = 2048
# Bins of the stand-in for a tensor whose values are at hand: all cells together, and the least for one.
COARSE_BINS, FEWEST_BINS = 16384, 128
# Values of a cell that are looked at to tell whether few of them repeat, and the distinct ones that are too many: first
# as many as cost next to nothing, of which 290 that repeat would show 103, then as many as make it certain.
REPETITION_SAMPLES = ((128, 120), (1024, 256))


@torch.no_grad()
def search_range(
    x: Tensor,
    bits: int,
    *,
    symmetric: bool,
    channel_axis: int | None = None,
    metric: str = "lp",
    name: str | None = None,
) -> QRange:
    """Quantizer parameters for `x`, one set, or one for each index of `channel_axis`.

    Args:
        x: tensor of any shape, finite; searched in float32.
        bits: 2 to 16.
        symmetric: zero point 0 on a signed grid (one-sided data: all levels on its side); else both ends and
            the zero point are free, with zero inside the range.
        metric: one of `METRICS`.
        name: layer to name in an error.

    Returns:
        QRange of 0-d tensors, or with every dimension but `channel_axis` of size 1; fits `fake_quantize`.

    Raises:
        ConfigError: unknown metric, bits or axis. QuantizationError: `x` is empty or holds NaN or infinity.
    """
    _check(bits, metric)
    rows, shape = _rows(x, channel_axis)
    if rows.numel() == 0:
        raise QuantizationError(f"{describe(name)}: found an empty tensor of shape {list(x.shape)}")
    low, high = finite_ends(rows, name)
    if metric == "percentile":
        low, high = -nearest_rank(-rows), nearest_rank(rows)
    if metric in ("minmax", "percentile"):
        found = choose_qparams(low, high, bits, symmetric)
    else:
        space = GridSpace(low, high, bits, symmetric)
        found = search_grid(space, *_sources(rows, metric, space))
    return QRange(*(part.reshape(shape) for part in found))


class RangeSketch(Histogram):
    """Range search for data that arrives in batches: counts in bounded memory, then searches on the counts.

    Usage: `update(x)` with x [cells, n] for each batch, then `search`. Takes 64 KiB per cell. The result
    depends on the multiset of all values only, not on the order or the split of the batches.
    """

    def __init__(self, cells: int, name: str | None = None, *, device: torch.device | str = "cpu") -> None:
        super().__init__(cells, SKETCH_BINS, name, device=device)

    @torch.no_grad()
    def search(self, bits: int, symmetric: bool, metric: str = "lp") -> QRange:
        """Parameters of shape [cells]; arguments and errors as in `search_range`.

        Raises QuantizationError if a cell has seen no value.
        """
        _check(bits, metric)
        if not bool((self.count > 0).all()):
            raise QuantizationError(f"{describe(self.name)}: its quantizer saw no data; calibrate through this layer")
        low, high = self.percentile(PERCENTILE) if metric == "percentile" else (self.min, self.max)
        if metric in ("minmax", "percentile"):
            return choose_qparams(low, high, bits, symmetric)
        space = GridSpace(low, high, bits, symmetric)
        source = _histogram_source(self, metric, space)
        return search_grid(space, source, source, self.count - self.zeros)


def check_metric(metric: str) -> None:
    """Check that `metric` is in `METRICS`, and that what was registered there can be used.

    Raises:
        ConfigError: it is not; the message names the metric.
    """
    if metric not in METRICS:
        raise ConfigError(f"metric={metric!r} is unknown: expected one of {', '.join(METRICS)}")
    own = METRICS[metric]
    if own is not None and not isinstance(own, HistogramMetric) and not _has_closed_form(metric):
        check_loss(metric, own)


def _has_closed_form(metric: str) -> bool:
    """Whether the errors of `metric` are sums that `ptq_exp.quantization.ranges.metrics` knows."""
    return metric == "cosine" if METRICS[metric] is None else METRICS[metric] is _LOSSES.get(metric)


def _check(bits: int, metric: str) -> None:
    integer_range(bits, signed=False)
    check_metric(metric)


def _rows(x: Tensor, channel_axis: int | None) -> tuple[Tensor, list[int]]:
    """`x` as float32 [cells, n], and the shape that makes [cells] broadcast against `x`."""
    x = x.detach().float()
    if channel_axis is None:
        return x.reshape(1, -1), []
    if not -x.ndim <= channel_axis < x.ndim:
        raise ConfigError(f"channel_axis={channel_axis} is not an axis of a tensor of shape {list(x.shape)}")
    shape = [1] * x.ndim
    shape[channel_axis] = -1
    return x.movedim(channel_axis, 0).flatten(1).contiguous(), shape


def _sources(rows: Tensor, metric: str, space: GridSpace) -> tuple[ErrorSource, ErrorSource, Tensor]:
    """Errors for the first pass and for the scan, and how many values other than zero each cell has, [cells].

    The first are those of a histogram, the second those of the values (but for `kl` and every `HistogramMetric`).
    """
    cells, n = rows.shape
    if metric == "kl" or isinstance(METRICS[metric], HistogramMetric):
        histogram = Histogram(cells, MOST_KL_BINS, device=rows.device)
        histogram.update(rows)
        source = _histogram_source(histogram, metric, space)
        return source, source, histogram.count - histogram.zeros
    closed = _has_closed_form(metric)
    if closed and (repeated := _distinct(rows)) is not None:
        values, counts = repeated
        exact = ValueErrors(values, metric, space.minmax.scale, counts)
        return exact, exact, (counts * (values != 0)).count_nonzero(1)
    if closed:
        exact = ValueErrors(rows, metric, space.minmax.scale)
    else:
        exact = ElementwiseErrors(rows, None, METRICS[metric])
    bins = min(max(COARSE_BINS // cells, FEWEST_BINS), SKETCH_BINS)
    histogram = Histogram(cells, _power_of_two(bins), device=rows.device)
    if n <= histogram.bins:
        return exact, exact, rows.count_nonzero(1)
    histogram.update(rows)
    return _histogram_source(histogram, metric, space), exact, histogram.count - histogram.zeros


def _distinct(rows: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the values [cells, m] of `rows` and how often each occurs, where few values occur often; else None.

    Their error scatters as that of m values does, not as that of n, and its minima are narrow.
    """
    n = rows.shape[1]
    for sample, most in REPETITION_SAMPLES:
        if _ranks(rows[:, :: -(-n // sample)])[1].amax() >= min(n, most):
            return None
    ordered, ranks = _ranks(rows)
    m = int(ranks.amax()) + 1
    if 4 * m > n:
        return None
    values, counts = rows.new_zeros(len(rows), m), rows.new_zeros(len(rows), m)
    return values.scatter_(1, ranks, ordered), counts.scatter_add_(1, ranks, torch.ones_like(rows))


def _ranks(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`rows` in ascending order, and the number of smaller distinct values for each."""
    ordered = rows.sort(1).values
    return ordered, torch.nn.functional.pad(ordered.diff(dim=1) != 0, (1, 0)).cumsum(1)


def _histogram_source(histogram: Histogram, metric: str, space: GridSpace) -> ErrorSource:
    if metric == "kl":
        # With more bins the sampling noise of n values outweighs what the quantizer loses.
        n = int(histogram.count.min())
        histogram = histogram.coarsened(_power_of_two(min(4 * math.isqrt(n), MOST_KL_BINS)))
        return CodeDivergence(histogram.width, *histogram.occupied(), space.bits)
    first, counts = histogram.occupied()
    edges = histogram.width * torch.arange(first, first + counts.shape[1] + 1, device=counts.device)
    if _has_closed_form(metric):
        return HistogramErrors(edges, counts, metric, space.minmax.scale)
    own = METRICS[metric]
    if isinstance(own, HistogramMetric):
        return own.make(edges, counts, space.bits)
    return ElementwiseErrors.of_histogram(edges, counts, own, space.minmax.scale)


def _power_of_two(x: int) -> int:
    """Largest power of two up to x."""
    return 1 << x.bit_length() - 1


def nearest_rank(rows: Tensor) -> Tensor:
    """Smallest value of each row that at least the fraction PERCENTILE of it does not exceed, [cells]."""
    return rows.kthvalue(math.ceil(PERCENTILE * rows.shape[1]), dim=1).values
