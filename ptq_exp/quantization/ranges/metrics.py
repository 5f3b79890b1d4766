"""Quantization error of many candidate quantizers at once, by metric, on values or on a histogram.

Notation: u = x / scale, v = clamp(round(u), qmin - zero_point, qmax - zero_point) the level, d = u - v. Then
x - q(x) = scale * d, and every metric is made of sums of functions of (u, d) and a power of the scale.

On a histogram the data counts as uniform inside each bin, and the sum over a bin is the difference of an
antiderivative G of such a function between the bin's two edges. G's mean slope is taken out and added again
as a constant per value (for mse the familiar scale^2 / 12): what is left is bounded inside the range, so
float32 is enough. This holds at any ratio of bin width to scale; bins wider than a step do not alias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ptq_exp.quantization.affine import QRange

# Elements per evaluated block, so that computing takes longer than asking for it; and the most points of a cell in one.
BLOCK, POINTS = 1 << 19, 1 << 17
EXPONENTS = {"l1": 1.0, "mse": 2.0, "lp": 2.4}

Summands = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


class ErrorSource(Protocol):
    """What the search minimises: `errors(candidates)` maps a QRange of shape [cells, k] to errors [cells, k].

    Errors are comparable within a cell only. `cost` is the number of elements read per candidate, `convex`
    whether the error of smooth data is close to convex in the range's ends, and so in the zero point at any scale.
    """

    cost: int
    convex: bool

    def errors(self, candidates: QRange) -> Tensor: ...


def power_(d: Tensor, p: float) -> Tensor:
    """|d|^p in place; float32 `pow` takes several times as long as logarithm and exponential together."""
    if p == 1.0:
        return d.abs_()
    if p == 2.0:
        return d.square_()
    return d.square_().log2_().mul_(p / 2).exp2_()


def value_summands(metric: str) -> Summands:
    """f(u, d) whose sums over the values make the metric: |d|^p; for cosine -u d and d^2. May overwrite d."""
    if metric == "cosine":
        return lambda u, d, scale: ((u * d).neg_(), d.square_())
    p = EXPONENTS[metric]
    return lambda u, d, scale: (power_(d, p),)


def edge_summands(metric: str) -> Summands:
    """Antiderivatives (in u) of `value_summands` less their mean slopes; see the module docstring."""
    if metric == "cosine":
        def cosine(u: Tensor, d: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            rest = 0.25 - d.square()
            return rest * ((u - d) / 2 + d / 3), rest * d / -3
        return cosine
    p = EXPONENTS[metric]
    return lambda u, d, scale: (power_(d.clone(), p).sub_(0.5**p).mul_(d.div_(p + 1)),)


def mean_slopes(metric: str) -> tuple[float, ...]:
    """Means of `value_summands` over whole levels, d uniform in [-1/2, 1/2]."""
    if metric == "cosine":
        return -1 / 12, 1 / 12
    p = EXPONENTS[metric]
    return (0.5**p / (p + 1),)


def block_sums(
    points: Tensor, weights: Tensor | None, candidates: QRange, summands: Summands
) -> list[Tensor]:
    """Return sums of weight * f(u, d, scale) over `points` [cells, n], one tensor [cells, k] for each f.

    `weights` is [cells, n], or None for ones; `candidates` is [cells, k]. f gets u, d [cells, k, n] and the scale
    [cells, k, 1] of a block; it may overwrite d, and must return tensors of its own.
    """
    inverse = candidates.scale.reciprocal().unsqueeze(-1)
    lowest = (candidates.qmin - candidates.zero_point).unsqueeze(-1)
    highest = (candidates.qmax - candidates.zero_point).unsqueeze(-1)
    totals: list[Tensor] = []
    for cell, k, n in _blocks(inverse.shape[0], inverse.shape[1], points.shape[1]):
        u = points[cell, None, n] * inverse[cell, k]
        level = u.round()
        torch.maximum(level, lowest[cell, k], out=level)
        torch.minimum(level, highest[cell, k], out=level)
        terms = summands(u, torch.sub(u, level, out=level), candidates.scale[cell, k, None])
        totals = totals or [torch.zeros_like(candidates.scale) for _ in terms]
        for total, term in zip(totals, terms, strict=True):
            if weights is not None:
                term.mul_(weights[cell, None, n])
            total[cell, k] += term.sum(-1)
    return totals


def _blocks(cells: int, candidates: int, points: int):
    """Slices (cell, candidate, point) that tile the three axes in blocks of at most about BLOCK elements."""
    n_step = min(points, POINTS)
    k_step = min(candidates, max(1, BLOCK // n_step))
    c_step = max(1, BLOCK // (n_step * k_step))
    for c in range(0, cells, c_step):
        for n in range(0, points, n_step):
            for k in range(0, candidates, k_step):
                yield slice(c, c + c_step), slice(k, k + k_step), slice(n, n + n_step)


def combine(metric: str, sums: list[Tensor], unit: Tensor, energy: Tensor) -> Tensor:
    """Metric from the sums of its summands.

    p-norms: unit^p * sum |d|^p. Cosine: 1 - <x, q> / (|x| |q|), which with a = <x, q - x> / |x|^2 and
    b = |q - x|^2 / |x|^2 is (b - a^2) / (r (r + 1 + a)), r = |q| / |x| = sqrt(1 + 2a + b): nothing cancels.

    Args:
        unit: scale over the cell's reference scale, [cells, k] (a reference keeps the powers inside float32).
        energy: sum of x^2 in units of the reference scale, [cells, 1].
    """
    if metric != "cosine":
        return power_(unit.clone(), EXPONENTS[metric]).mul_(sums[0])
    energy = energy.clamp(min=torch.finfo(energy.dtype).tiny)
    a, b = (unit.square() * total / energy for total in sums)
    r = (1 + 2 * a + b).clamp_(min=0).sqrt_()
    return torch.where(r > 1e-6, (b - a.square()).clamp_(min=0) / (r * (r + 1 + a)), 1.0)


@dataclass
class ValueErrors:
    """Errors on the values themselves: `rows` [cells, n]; `reference` [cells, 1], any scale of each cell.

    `weights` [cells, n] says how often each value occurs; None = once.
    """

    rows: Tensor
    metric: str
    reference: Tensor
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        self.cost, self.convex = self.rows.numel(), True
        self._energy = torch.zeros_like(self.reference)
        if self.metric == "cosine":
            squares = (self.rows / self.reference).square_()
            squares = squares if self.weights is None else squares.mul_(self.weights)
            self._energy = squares.sum(1, keepdim=True)

    def errors(self, candidates: QRange) -> Tensor:
        sums = block_sums(self.rows, self.weights, candidates, value_summands(self.metric))
        return combine(self.metric, sums, candidates.scale / self.reference, self._energy)


@dataclass
class HistogramErrors:
    """Errors on a histogram: `edges` [cells, bins + 1], equally spaced; `counts` [cells, bins]."""

    edges: Tensor
    counts: Tensor
    metric: str
    reference: Tensor

    def __post_init__(self) -> None:
        self.cost, self.convex = self.edges.numel(), True
        density = (self.counts.double() / self.counts.sum(1, keepdim=True).clamp(min=1)).float()
        self._total = density.sum(1, keepdim=True)  # 1, or 0 for a cell without counts
        # Abel summation: sum w_j (G_{j+1} - G_j) = sum (w_{j-1} - w_j) G_j, one weight per edge.
        self._weights = -torch.nn.functional.pad(density, (1, 1)).diff(dim=1)
        self._width = self.edges[:, 1:2] - self.edges[:, :1]
        centers = (self.edges[:, 1:] + self.edges[:, :-1]) / 2
        squares = (centers.square() + self._width.square() / 12) / self.reference.square()
        self._energy = (density * squares).sum(1, keepdim=True)

    def errors(self, candidates: QRange) -> Tensor:
        sums = block_sums(self.edges, self._weights, candidates, edge_summands(self.metric))
        bins_per_step = candidates.scale / self._width
        sums = [slope * self._total + total * bins_per_step
                for slope, total in zip(mean_slopes(self.metric), sums, strict=True)]
        return combine(self.metric, sums, candidates.scale / self.reference, self._energy)


@dataclass
class CodeDivergence:
    """KL(P || Q) between the histogram P of x and the one a reader of the codes alone would reconstruct.

    Q spreads the mass of each code evenly over the non-empty bins that round to it. This is the calibration
    of Migacz 2017, "8-bit Inference with TensorRT", but for the clipped bins: they belong to the outermost
    code instead of being folded onto the outermost bin, which keeps the divergence finite. Exact zeros are
    not counted, as every candidate reproduces them. A code is a run of bins: two prefix sums give its share.

    Args:
        width: [cells, 1] of the bins. first: signed number of the first bin; bin j covers [j, j + 1) * width.
        counts: [cells, bins]. bits: of all candidates.
    """

    width: Tensor
    first: int
    counts: Tensor
    bits: int

    def __post_init__(self) -> None:
        probability = self.counts.double() / self.counts.sum(1, keepdim=True).clamp(min=1)
        pad = torch.nn.functional.pad
        self._mass = pad(probability.cumsum(1), (1, 0))
        self._occupied = pad((self.counts > 0).double().cumsum(1), (1, 0))
        self._negative_entropy = torch.xlogy(probability, probability).sum(1, keepdim=True)
        # A code costs about as much as sixteen elements of the other sources.
        self.cost, self.convex = 16 * len(self.counts) * 2**self.bits, False

    def errors(self, candidates: QRange) -> Tensor:
        step = max(1, 2 * BLOCK // (2**self.bits * len(self.counts)))
        parts = [self._divergence(QRange(*(part[:, k:k + step] for part in candidates)))
                 for k in range(0, candidates.scale.shape[1], step)]
        return torch.cat(parts, dim=1)

    def _divergence(self, candidates: QRange) -> Tensor:
        (cells, bins), codes = self.counts.shape, 2**self.bits
        lowest = (candidates.qmin - candidates.zero_point).unsqueeze(-1)
        upper = lowest + torch.arange(codes - 1, device=lowest.device) + 0.5
        # Bin j's centre (j + 1/2) * width reaches the next code from this j on.
        boundary = (upper * (candidates.scale / self.width).unsqueeze(-1) - 0.5).ceil_().sub_(self.first)
        boundary = torch.nn.functional.pad(boundary.clamp_(0, bins), (1, 0))
        boundary = torch.nn.functional.pad(boundary, (0, 1), value=bins).long().flatten(1)
        mass = self._mass.gather(1, boundary).view(cells, -1, codes + 1).diff(dim=-1)
        occupied = self._occupied.gather(1, boundary).view(cells, -1, codes + 1).diff(dim=-1)
        divergence = self._negative_entropy - torch.xlogy(mass, mass / occupied.clamp_(min=1)).sum(-1)
        return divergence.mul_(2.0**40).round_()  # rounding noise must not decide between equal candidates
