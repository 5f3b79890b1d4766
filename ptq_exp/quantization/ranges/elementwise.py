"""Range metrics that are the mean of a loss of the error x - q(x): any function of it, value by value."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq_exp.errors import ConfigError, one_line
from ptq_exp.quantization.affine import QRange
from ptq_exp.quantization.ranges.metrics import ErrorSource, block_sums

Loss = Callable[[Tensor], Tensor]
"""Maps errors x - q(x), of any shape and in units of the data, to losses >= 0 of the same shape."""

# Points per step of the data's own range at which a histogram is read: fewer would fall on the same place of every step
# where bins are as wide as steps. And the most per bin.
POINTS_PER_STEP, MOST_POINTS = 8, 16
# Errors at which a loss is looked at for convexity, as shares of the largest value.
PROBES = 64


@dataclass(frozen=True)
class HistogramMetric:
    """A range metric that is no mean over values: `make` gives its errors on a histogram.

    `make` takes the edges [cells, bins + 1], the counts [cells, bins] and the bits, and returns an `ErrorSource`.
    """

    make: Callable[[Tensor, Tensor, int], ErrorSource]


@dataclass
class ElementwiseErrors:
    """Mean loss of x - q(x) over `points` [cells, n], each with a weight in `weights` [cells, n]; None = all alike.

    The error is convex in the ends of the range where the loss is convex up to the largest point.
    """

    points: Tensor
    weights: Tensor | None
    loss: Loss

    def __post_init__(self) -> None:
        self.cost, self.convex = self.points.numel(), is_convex(self.loss, self.points)

    @classmethod
    def of_histogram(cls, edges: Tensor, counts: Tensor, loss: Loss, step: Tensor) -> ElementwiseErrors:
        """Read the loss at the centres of bins, or of equal parts of them where bins are wide.

        Args:
            edges: [cells, bins + 1], equally spaced.
            counts: [cells, bins].
            step: [cells, 1], scale of the data's own range.
        """
        width = edges[:, 1:2] - edges[:, :1]
        most = float((width / step).max()) * POINTS_PER_STEP
        parts = min(max(math.ceil(most), 1), MOST_POINTS)
        inside = (torch.arange(parts, device=edges.device) + 0.5) / parts
        points = (edges[:, :-1, None] + width[:, :, None] * inside).flatten(1)
        share = (counts.double() / counts.sum(1, keepdim=True).clamp(min=1) / parts).float()
        return cls(points, share.repeat_interleave(parts, dim=1), loss)

    def errors(self, candidates: QRange) -> Tensor:
        """Return mean losses [cells, k]."""
        (total,) = block_sums(
            self.points, self.weights, candidates, lambda u, d, scale: (self.loss(d.mul_(scale)).float(),)
        )
        return total if self.weights is not None else total / self.points.shape[1]


def is_convex(loss: Loss, points: Tensor) -> bool:
    """Return whether `loss` is convex for errors up to the largest of `points`, looked at where it may bend."""
    largest = max(float(points.abs().max()), torch.finfo(torch.float32).tiny)
    side = largest * torch.logspace(-4, 0, PROBES, dtype=torch.float64, device=points.device)
    x = torch.cat((-side.flip(0), side.new_zeros(1), side))
    slopes = loss(x.clone()).diff() / x.diff()
    return bool((slopes.diff() >= -1e-6 * slopes.abs().max()).all())


def check_loss(name: str, loss: Loss) -> None:
    """Check that `loss` maps errors to finite losses of the same shape, none below zero.

    Raises:
        ConfigError: it does not; the message names the metric.
    """
    e = torch.linspace(-1, 1, 6).reshape(2, 3)
    try:
        found = loss(e.clone())
    except Exception as error:
        raise ConfigError(
            f"METRICS[{name!r}] is no loss of an error: called with a tensor it ends with {type(error).__name__} "
            f"({one_line(error, 120)}); give a function of x - q, or HistogramMetric(function of edges, counts, bits)"
        ) from error
    fits = isinstance(found, Tensor) and found.shape == e.shape
    if not fits or not bool((torch.isfinite(found) & (found >= 0)).all()):
        raise ConfigError(
            f"METRICS[{name!r}] is no loss of an error: it must return a tensor of the shape of its argument, finite "
            "and nowhere negative"
        )
