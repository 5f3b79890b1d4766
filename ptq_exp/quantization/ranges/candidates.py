"""Candidate grids of a range search, and the best of them found so far.

A cell is one quantizer's share of a tensor (the tensor, a channel, a segment). A candidate is a pair (t, z): the
scale is exp(t) times that of the data's own range, z is the zero point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq_exp.quantization.affine import SCALE_FLOOR, QRange, choose_qparams
from ptq_exp.quantization.ranges.metrics import ErrorSource

# No scale of this many times the data's own, or more, is better than its half.
LARGEST = 2.0
_FEW = 1 << 13  # numbers up to which sorting takes no longer than anything else


@dataclass
class GridSpace:
    """Candidate grids for cells whose smallest and largest values are `low` and `high`, [cells]."""

    low: Tensor
    high: Tensor
    bits: int
    symmetric: bool

    def __post_init__(self) -> None:
        self.constant = self.low == self.high
        self.low, self.high = self.low.clamp(max=0)[:, None], self.high.clamp(min=0)[:, None]
        self.minmax = choose_qparams(self.low, self.high, self.bits, self.symmetric)
        free = (self.low < 0) & (self.high > 0) & (not self.symmetric)
        self.axes = 2 if bool(free.any()) else 1
        # One-sided data spends no level on the other side.
        self.lowest = torch.where(free, self.minmax.qmin, self.minmax.zero_point)
        self.highest = torch.where(free, self.minmax.qmax, self.minmax.zero_point)

    def candidates(self, t: Tensor, z: Tensor) -> QRange:
        """Quantizers [cells, k] of t, z [cells, k]."""
        scale = (self.minmax.scale * t.exp()).clamp_(min=SCALE_FLOOR)
        return QRange(scale, z, self.minmax.qmin.expand_as(scale), self.minmax.qmax.expand_as(scale))

    def clamp(self, z: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(z.round(), self.lowest), self.highest)


class Beam:
    """The best candidates found so far, best first: t, z and their errors by `source`, [cells, width]."""

    def __init__(self, space: GridSpace, source: ErrorSource, t: Tensor, z: Tensor, width: int) -> None:
        self.space, self.source, self.width = space, source, width
        self.t, self.z, self.errors = t[:, :0], z[:, :0], t[:, :0]
        self.offer(t, z)

    def offer(self, t: Tensor, z: Tensor) -> None:
        """Evaluate the candidates t, z [cells, k], and keep the best of what is held and what is new."""
        errors = torch.cat((self.errors, self.source.errors(self.space.candidates(t, z))), 1)
        # of equal candidates the one held longest stays, so the data's own range wins a tie
        self.errors, order = least(errors, self.width)
        self.t, self.z = (torch.cat(parts, 1).gather(1, order) for parts in ((self.t, t), (self.z, z)))

    def refine(self, size: float, shift: int) -> None:
        """Offers the neighbours of all that is held: `size` away in t, or `shift` levels away in z, or both."""
        moves = torch.tensor([0.0, -1.0, 1.0], device=self.t.device)
        both = torch.cartesian_prod(moves * size, moves * shift)[1:] if self.space.axes == 2 else moves[1:, None] * size
        t = (self.t.unsqueeze(-1) + both[:, 0]).flatten(1).clamp_(max=math.log(LARGEST))
        z = (self.z.unsqueeze(-1) + (both[:, 1] if self.space.axes == 2 else 0)).expand(*self.z.shape, len(both))
        self.offer(t, self.space.clamp(z.flatten(1)))


def least(errors: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the `width` least of each row, ascending, and their places; of equal ones the first come first.

    It is what a stable sort begins with, which takes several times as long where there are many.
    """
    if errors.shape[1] > 4 * width and errors.numel() > _FEW:
        found, places = errors.topk(width, dim=1, largest=False)
        # else equal ones of a row are left out, or NaN are in it
        if bool(((errors <= found[:, -1:]).sum(1) == width).all()):
            places = places.sort(1).values
            found, order = errors.gather(1, places).sort(dim=1, stable=True)
            return found, places.gather(1, order)
    found, places = errors.sort(dim=1, stable=True)
    return found[:, :width], places[:, :width]
