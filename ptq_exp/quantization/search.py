"""Coarse-to-fine search for the ends of quantization ranges, vectorised over cells and candidates.

A cell is one quantizer's share of a tensor (the tensor, a channel, a segment). A candidate is a pair (a, b)
of fractions of its two range ends; an asymmetric search moves both, a symmetric one moves them together.

On smooth data the error is nearly convex in the ends: the clipped part is a convex function of each end, the
rounding part grows with their distance. So a geometric grid and ever smaller moves from its best candidate
find the optimum, and they may run on a cheap stand-in for the data (a histogram). The error of n actual
values scatters around the smooth one by about 1/sqrt(n) between neighbouring candidates, so the last stages
scan a window of that size on the data themselves, as densely as a budget of element evaluations allows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq_exp.quantization.affine import QRange, choose_qparams
from ptq_exp.quantization.errors_by_metric import ErrorSource

# The first grid spans this factor of each end, in few steps where the error is convex, in more where it is
# not (as many as that budget of element evaluations allows); it is repeated further down while that helps.
GRID_SPAN, SMALLEST_END = 0.04, 1e-4
CONVEX_GRID, ROUGH_GRID, ROUGH_BUDGET = 5, 25, 100_000_000
# Finest move, relative to an end, that the smooth stages resolve.
SMOOTH_MOVE = 0.02
# Element evaluations of the last stages, and their bounds in candidates: at least a few, whatever the tensor.
BUDGET = 4_000_000
FEWEST, MOST = 11, 4096
# The last moves follow at most so many candidates, down to relative moves of this size.
BEAM_WIDTH, FINEST_MOVE = 8, 1e-5


@dataclass
class EndSpace:
    """Range ends as fractions of the cells' reach; `low`, `high` [cells]: smallest and largest values."""

    low: Tensor
    high: Tensor
    bits: int
    symmetric: bool

    def __post_init__(self) -> None:
        self.constant = self.low == self.high
        self.low, self.high = self.low.clamp(max=0)[:, None], self.high.clamp(min=0)[:, None]
        self.minmax = choose_qparams(self.low, self.high, self.bits, self.symmetric)
        two_sided = (self.low < 0) & (self.high > 0)
        # The best grid may reach beyond the data by part of a step, where the zero point is rounded outwards.
        extra = self.minmax.scale * (two_sided & (not self.symmetric))
        self._reach_low, self._reach_high = self.low - extra, self.high + extra
        self.axes = 2 if not self.symmetric and bool(two_sided.any()) else 1

    def candidates(self, a: Tensor, b: Tensor) -> QRange:
        """Quantizers [cells, k] of the fractions a, b [cells, k]."""
        return choose_qparams(a * self._reach_low, b * self._reach_high, self.bits, self.symmetric)

    def plain(self) -> tuple[Tensor, Tensor]:
        """The fractions [cells, 1] that are the data's own ends."""
        one = torch.ones_like(self.low)
        return (torch.where(self.low < 0, self.low / self._reach_low, one),
                torch.where(self.high > 0, self.high / self._reach_high, one))

    def grid(self, moves: Tensor) -> tuple[Tensor, Tensor]:
        """Moves of (a, b): all pairs of `moves`, or with one axis the same for both ends."""
        if self.axes == 1:
            return moves, moves
        return moves.repeat_interleave(len(moves)), moves.repeat(len(moves))

    def steps(self, size: float) -> list[tuple[Tensor, Tensor]]:
        """Moves of (a, b) by `size` to either side: both ends alike; with two axes also against each other.

        The first changes the scale and keeps the zero point, the second shifts the range. Moving one end at a
        time instead is stopped early by the rounding of the zero point.
        """
        both = torch.tensor([-size, size], device=self.low.device)
        return [(both, both), (both, -both)][: self.axes]


class Beam:
    """The best candidates found so far, best first: a, b and their errors by `source`, [cells, width]."""

    def __init__(self, space: EndSpace, source: ErrorSource, a: Tensor, b: Tensor, width: int = 1) -> None:
        self.space, self.source, self.width = space, source, width
        self.a, self.b, self.errors = a, b, source.errors(space.candidates(a, b))

    def move(self, on_a: Tensor, on_b: Tensor, start: Beam | None = None) -> None:
        """Tries (a, b) times (exp(on_a), exp(on_b)), [k] each, for every (a, b) held by `start` (or by self).

        Keeps the best of what is held and what is new.
        """
        start = start or self
        a = (start.a.unsqueeze(-1) * on_a.exp()).flatten(1).clamp_(max=1)
        b = (start.b.unsqueeze(-1) * on_b.exp()).flatten(1).clamp_(max=1)
        errors = torch.cat((self.errors, self.source.errors(self.space.candidates(a, b))), 1)
        # Stable: of equal candidates the one held longest stays, so the data's own ends win a tie.
        errors, order = errors.sort(dim=1, stable=True)
        self.errors, order = errors[:, : self.width], order[:, : self.width]
        self.a, self.b = (torch.cat(ends, 1).gather(1, order) for ends in ((self.a, a), (self.b, b)))


def search_ends(space: EndSpace, smooth: ErrorSource, exact: ErrorSource, samples: int) -> QRange:
    """Best quantizer per cell, [cells]; by `exact` never worse than the data's own ends.

    Equal values get their own range, which holds them exactly; a histogram or a scale-free metric cannot tell.

    Args:
        smooth: errors for the coarse stages; exact: for the last stages (may be the same).
        samples: values per cell.
    """
    plain = QRange(*(part.squeeze(1) for part in space.minmax))
    beam = Beam(space, smooth, *space.plain(), width=1 if smooth.convex else BEAM_WIDTH)
    if not bool((beam.errors > 0).any()):
        return plain
    size = _coarse(beam)
    step = 2.0**-space.bits
    while size > min(2 * step, SMOOTH_MOVE):
        size /= 2
        for moves in space.steps(size):
            beam.move(*moves)
    a, b = _scan(space, exact, beam, min(4 / math.sqrt(samples), 0.5) + step / 2)
    found = (part.squeeze(1) for part in space.candidates(a, b))
    return QRange(*(torch.where(space.constant, *pair) for pair in zip(plain, found, strict=True)))


def _coarse(beam: Beam) -> float:
    """Tries a geometric grid, going on where a cell's best lies at the grid's low end; returns its spacing."""
    space, source = beam.space, beam.source
    count = CONVEX_GRID
    if not source.convex:
        count = min(max(int((ROUGH_BUDGET / source.cost) ** (1 / space.axes)), CONVEX_GRID), ROUGH_GRID)
    size, lowest = -math.log(GRID_SPAN) / (count - 1), 1.0
    while lowest > SMALLEST_END and min(float(beam.a.min()), float(beam.b.min())) < 1.01 * lowest:
        beam.move(*space.grid(-size * torch.arange(count, device=space.low.device)))
        lowest *= GRID_SPAN
    return size


def _scan(space: EndSpace, source: ErrorSource, center: Beam, half_width: float) -> tuple[Tensor, Tensor]:
    """Fractions [cells, 1] that are best on a grid of +-`half_width` around `center`, then refined."""
    budget = min(max(BUDGET // source.cost, FEWEST), MOST)
    width = min(max(budget // 64, 1), BEAM_WIDTH)
    per_axis = int((2 * budget / 3) ** (1 / space.axes))
    half = (per_axis - 1) // 2
    size = min(half_width / max(half, 1), 2.0**-space.bits)
    beam = Beam(space, source, *space.plain(), width=width)
    beam.move(*space.grid(size * torch.arange(-half, half + 1, device=space.low.device)), center)
    rounds = (budget - (2 * half + 1) ** space.axes) // (2 * space.axes * width)
    for _ in range(rounds):
        size /= 2
        if size < FINEST_MOVE:
            break
        for moves in space.steps(size):
            beam.move(*moves)
    return beam.a[:, :1], beam.b[:, :1]
