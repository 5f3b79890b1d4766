"""Search for the scale and the zero point of quantization ranges, vectorised over cells and candidates.

A cell is one quantizer's share of a tensor (the tensor, a channel, a segment). A candidate is a pair (t, z): the
scale is exp(t) times that of the data's own range, z is the zero point.

Three facts shape the search:

1. A scale of twice the data's own or more cannot win: half of it still covers the data, with a grid that holds
   the same levels. Scales up to that may: with few values or few levels the best range ends beyond the data.
2. At a given scale the zero point moves the clipped ends only, and a p-norm of the error is a convex function of
   it: each end's share is convex in its number of levels. So bisection finds the best zero point of any scale.
3. The error as a function of the scale alone is rough. One level moves past a value whenever the largest level
   moves by a fraction of a step, so neighbours 2^-bits apart in t are all but independent; the error of n values
   scatters by about 1/sqrt(n) around a smooth curve. That curve (of a histogram) tells which scales may win, and
   these are scanned on the values, as densely as a budget of element evaluations allows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq_exp.quantization.affine import SCALE_FLOOR, QRange, choose_qparams
from ptq_exp.quantization.errors_by_metric import ErrorSource

# Scales of the first pass, as factors of the data's own: from the largest down to the smallest, and on down to the
# very least while a cell's best lies at the low end. Their finest spacing, and the least number that makes sense.
LARGEST, SMALLEST, LEAST = 2.0, 0.005, 1e-5
COARSE_SPACING, FEWEST_SCALES = 0.03, 10
# Else the first pass varies both ends: down to this factor at a time, in so many steps as this budget of element
# evaluations allows.
END_SPAN, FEWEST_ENDS, MOST_ENDS, ENDS_BUDGET = 0.04, 5, 25, 100_000_000
# A scale may win if its smooth error is within SCATTER / sqrt(n) of the least, the more so with few values, whose error
# can vanish by chance: times 1 + SPREAD / n.
SCATTER, SPREAD = 5.0, 50
# Budgets of element evaluations, of the first pass and of the scan, and the elements up to which they hold.
COARSE_BUDGET, COARSE_AMPLE = 4_000_000, 8192
BUDGET, AMPLE = 10_000_000, 300_000
# Bounds of the scan in candidates.
FEWEST, MOST, MOST_ROUNDS = 11, 65_536, 16
# Candidates that the refinement follows, and its finest move in t: where the error is rough, and where its scatter is
# below SMOOTH (there a move of the largest level by so much of a step).
BEAM_WIDTH, FINEST_MOVE = 8, 1e-5
SMOOTH, SMOOTH_WIDTH, SMOOTH_MOVE = 0.02, 2, 1 / 256
# The same for the few values whose scatter is above WILD, and the move of the largest level, in steps, from one scale of
# the scan to the next: then, and else.
WILD, WILD_WIDTH = 1.0, 64
WILD_DENSITY, DENSITY, SPARSE = 1 / 32, 1 / 8, 1 / 2


def affordable(budget: int, ample: int, cost: int) -> int:
    """Candidates within `budget` element evaluations; more than `ample` elements get less, to bound their time."""
    return budget * ample // (cost * max(cost, ample))


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
        """Evaluates the candidates t, z [cells, k], and keeps the best of what is held and what is new."""
        errors = torch.cat((self.errors, self.source.errors(self.space.candidates(t, z))), 1)
        # Stable: of equal candidates the one held longest stays, so the data's own range wins a tie.
        errors, order = errors.sort(dim=1, stable=True)
        self.errors, order = errors[:, : self.width], order[:, : self.width]
        self.t, self.z = (torch.cat(parts, 1).gather(1, order) for parts in ((self.t, t), (self.z, z)))

    def refine(self, size: float, shift: int) -> None:
        """Offers the neighbours of all that is held: `size` away in t, or `shift` levels away in z, or both."""
        moves = torch.tensor([0.0, -1.0, 1.0], device=self.t.device)
        both = torch.cartesian_prod(moves * size, moves * shift)[1:] if self.space.axes == 2 else moves[1:, None] * size
        t = (self.t.unsqueeze(-1) + both[:, 0]).flatten(1).clamp_(max=math.log(LARGEST))
        z = (self.z.unsqueeze(-1) + (both[:, 1] if self.space.axes == 2 else 0)).expand(*self.z.shape, len(both))
        self.offer(t, self.space.clamp(z.flatten(1)))


@dataclass
class Path:
    """The best zero points and the errors of equally spaced scales: t, z, errors [cells, k]."""

    t: Tensor
    z: Tensor
    errors: Tensor
    spacing: float

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.t, self.z, self.errors

    def promising(self, tolerance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(t, z, slope of z in t), [cells, m], best first, of all scales within `tolerance` [cells, 1] of the least."""
        slope = torch.zeros_like(self.z)
        if self.z.shape[1] > 1:
            slope = torch.gradient(self.z, spacing=self.spacing, dim=1)[0]
        within = self.errors <= self.errors.amin(1, keepdim=True) * (1 + tolerance)
        order = self.errors.argsort(dim=1, stable=True)[:, : int(within.sum(1).max())]
        return tuple(part.gather(1, order) for part in (self.t, self.z, slope))


def search_grid(space: GridSpace, smooth: ErrorSource, exact: ErrorSource, samples: Tensor) -> QRange:
    """Best quantizer per cell, [cells]; by `exact` never worse than the data's own range.

    Equal values get their own range, which holds them exactly; a histogram or a scale-free metric cannot tell.

    Args:
        smooth: errors for the first pass; exact: for the scan (may be the same).
        samples: [cells], values that carry an error (others than zero).
    """
    plain = QRange(*(part.squeeze(1) for part in space.minmax))
    n = samples.clamp(min=1)[:, None].float()
    tolerance = SCATTER / n.sqrt() * (1 + SPREAD / n) * ~space.constant[:, None]
    count = min(max(affordable(BUDGET, AMPLE, exact.cost), FEWEST), MOST)
    widest, finest = BEAM_WIDTH, FINEST_MOVE
    if float(tolerance.max()) > WILD:
        widest = max(min(count // 256, WILD_WIDTH), BEAM_WIDTH)
    elif float(tolerance.max()) < SMOOTH:
        widest, finest = SMOOTH_WIDTH, 2 * SMOOTH_MOVE / 2**space.bits
    width = min(max(count // 64, 1), widest)
    beam = Beam(space, exact, torch.zeros_like(space.low), space.minmax.zero_point, width)
    if not bool((beam.errors > 0).any()):
        return plain
    moves = width * (2 if space.axes == 1 else 8)
    rounds = min(max(count // (2 * moves), 1), MOST_ROUNDS)
    density = WILD_DENSITY if float(tolerance.max()) > WILD else DENSITY
    spacing = _scan(beam, *_first_pass(space, smooth, tolerance, count), count - rounds * moves, density)
    for _ in range(rounds):
        spacing /= 2
        if spacing < finest:
            break
        beam.refine(spacing, 1)
    found = (part.squeeze(1) for part in space.candidates(beam.t[:, :1], beam.z[:, :1]))
    return QRange(*(torch.where(space.constant, *pair) for pair in zip(plain, found, strict=True)))


Promising = tuple[tuple[Tensor, Tensor, Tensor], float]


def _first_pass(space: GridSpace, source: ErrorSource, tolerance: Tensor, count: int) -> Promising:
    """Scales whose error is within `tolerance` [cells, 1] of the least, and their spacing.

    With little to spend, here or on the scan of `count` candidates, these are but the best one.
    """
    evaluations = 2 * space.bits + 1 if space.axes == 2 else 1
    most = affordable(COARSE_BUDGET, COARSE_AMPLE, source.cost) // evaluations
    widest = float(tolerance.max())
    if not source.convex:
        (t, z, slope), spacing = _vary_ends(space, source, BEAM_WIDTH)
        return (t, z, slope), max(spacing, min(2 * widest, 1.0))
    if most >= FEWEST_SCALES:
        path = _whole_path(space, source, most)
        found, spacing = path.promising(tolerance), path.spacing
        if spacing <= _goal(space):
            return found, spacing
        found, spacing = _halve(space, source, *found[:2], spacing, width=2)
    else:
        found, spacing = _vary_ends(space, source, width=1)
    side = min(math.ceil(min(widest, 1.0) / 2 / spacing), count // (32 if space.axes == 2 else 2 * _scales(space, spacing, SPARSE)))
    if side == 0:
        return found, spacing
    around = found[0][:, :1] + spacing * torch.arange(-side, side + 1, device=tolerance.device)
    return _path(space, source, around.clamp_(max=math.log(LARGEST)), spacing).promising(tolerance), spacing


def _whole_path(space: GridSpace, source: ErrorSource, most: int) -> Path:
    """The path of up to `most` scales from the largest to the smallest, and on while a cell's best is the lowest."""
    lowest = math.log(SMALLEST)
    count = min(math.ceil((math.log(LARGEST) - lowest) / _goal(space)), most)
    spacing = (math.log(LARGEST) - lowest) / count
    steps = spacing * torch.arange(count + 1, device=space.low.device)
    path = _path(space, source, lowest + steps, spacing)
    while lowest > math.log(LEAST) and bool((path.errors.argmin(1) == 0).any()):
        lowest -= spacing * count
        lower = _path(space, source, lowest + steps[:-1], spacing)
        path = Path(*(torch.cat(parts, 1) for parts in zip(lower.parts(), path.parts(), strict=True)), spacing)
    return path


def _path(space: GridSpace, source: ErrorSource, t: Tensor, spacing: float) -> Path:
    """Finds the best zero point of every scale t, [k] or [cells, k], by bisection of the error's slope."""
    t = t.expand(len(space.low), t.shape[-1])
    low, high = space.lowest.expand_as(t), space.highest.expand_as(t)
    for _ in range(space.bits if space.axes == 2 else 0):
        middle = ((low + high) / 2).floor()
        above = torch.minimum(middle + 1, high)
        pair = source.errors(space.candidates(torch.cat((t, t), 1), torch.cat((middle, above), 1)))
        falling = pair[:, t.shape[1]:] < pair[:, : t.shape[1]]
        low, high = torch.where(falling, above, low), torch.where(falling, high, middle)
    return Path(t, low, source.errors(space.candidates(t, low)), spacing)


def _vary_ends(space: GridSpace, source: ErrorSource, width: int) -> Promising:
    """The `width` best on a geometric grid of both ends, going on where the best is the lowest, and their spacing."""
    fewest = FEWEST_ENDS if source.convex else MOST_ENDS ** (3 - space.axes)
    count = max(min(int((ENDS_BUDGET / source.cost) ** (1 / space.axes)), fewest), FEWEST_ENDS)
    size, lowest = -math.log(END_SPAN) / (count - 1), 0.0
    steps = -size * torch.arange(count, device=space.low.device)
    on_low, on_high = torch.cartesian_prod(steps, steps).T if space.axes == 2 else (steps, steps)
    beam = Beam(space, source, torch.zeros_like(space.low), space.minmax.zero_point, width)
    while lowest > math.log(LEAST) and bool((beam.t[:, 0] < lowest + size / 2).any()):
        grid = choose_qparams(space.low * (on_low + lowest).exp(), space.high * (on_high + lowest).exp(),
                              space.bits, space.symmetric)
        beam.offer((grid.scale / space.minmax.scale).log(), grid.zero_point)
        lowest += math.log(END_SPAN)
    return _halve(space, source, beam.t, beam.z, size, width)


def _halve(space: GridSpace, source: ErrorSource, t: Tensor, z: Tensor, spacing: float, width: int) -> Promising:
    """Follows the `width` best of t, z [cells, k] down to the spacing that the scan starts from."""
    beam = Beam(space, source, t[:, :width], z[:, :width], width)
    while spacing > _goal(space):
        spacing /= 2
        beam.refine(spacing, max(1, round(spacing * 2**space.bits / 4)))
    if space.axes == 1:  # two moves; with two axes they would be eight
        beam.refine(spacing / 2, 1)
    return (beam.t, beam.z, torch.zeros_like(beam.z)), spacing


def _goal(space: GridSpace) -> float:
    """Spacing of the first pass in t: the largest level moves by a quarter of a step, or the error is smooth."""
    return max(2.0 ** -(space.bits + 1), COARSE_SPACING)


def _scales(space: GridSpace, spacing: float, move: float) -> int:
    """Number of scales within `spacing` from each of which to the next the largest level moves by `move` steps."""
    return max(round(spacing * 2 ** (space.bits - 1) / move), 1)


def _scan(beam: Beam, promising: tuple[Tensor, Tensor, Tensor], spacing: float, count: int, density: float) -> float:
    """Offers scales within spacing / 2 of the promising ones, about `count` in all; returns their own spacing."""
    space, (t, z, slope) = beam.space, promising
    dense, sparse = (_scales(space, spacing, move) for move in (density, SPARSE))
    variants = 3 if space.axes == 2 and 3 * dense * t.shape[1] <= count else 1
    # neighbours of the sparse ones are all but independent: with little to spend many of those are worth more
    kept = min(t.shape[1], max(count // (sparse * variants), 1))
    per_scale = min(dense, max(count // (kept * variants), 1))
    t, z, slope = (part[:, :kept, None, None] for part in (t, z, slope))
    offset = (torch.arange(per_scale, device=t.device) - (per_scale - 1) / 2)[:, None] * (spacing / per_scale)
    shift = torch.arange(variants, device=t.device) - variants // 2
    z = space.clamp((z + slope * offset + shift).flatten(1))
    t = (t + offset).expand(*t.shape[:2], per_scale, variants).flatten(1)
    beam.offer(t.clamp(max=math.log(LARGEST)), z)
    return spacing / per_scale
