"""Search for the scale and the zero point of quantization ranges, vectorised over cells and candidates.

Candidates are pairs (t, z) of a scale, exp(t) times that of the data's own range, and a zero point: see `GridSpace`.

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

from ptq_exp.quantization.affine import QRange, choose_qparams
from ptq_exp.quantization.ranges.candidates import LARGEST, Beam, GridSpace
from ptq_exp.quantization.ranges.metrics import ErrorSource

# Scales of the first pass, as factors of the data's own: from LARGEST down to the smallest, and on down to the
# very least while a cell's best lies at the low end. Their finest spacing, and the least number that makes sense.
SMALLEST, LEAST = 0.005, 1e-5
COARSE_SPACING, FEWEST_SCALES = 0.03, 10
# The cosine does not see the magnitude, and its histogram sums cancel where nearly all is clipped: no smaller scales.
SMALLEST_OF_COSINE = 0.1
# Else the first pass varies both ends: down to this factor at a time, in so many steps as a budget of element
# evaluations allows; of an error that is not convex it follows so many of the best.
END_SPAN, FEWEST_ENDS, MOST_ENDS, ENDS_WIDTH = 0.04, 5, 25, 8
ENDS_BUDGET = 100_000_000
# A scale may win if its smooth error is within SCATTER / sqrt(n) of the least; the more so with few values, whose
# error can vanish by chance: times 1 + SPREAD / n.
SCATTER, SPREAD = 5.0, 50
# Budgets of element evaluations, of the first pass and of the scan, and the elements up to which they hold.
COARSE_BUDGET, COARSE_AMPLE = 4_000_000, 8192
BUDGET, AMPLE = 40_000_000, 75_000
# Bounds of the scan and its refinement: candidates; rounds.
FEWEST, MOST, MOST_ROUNDS = 9, 65_536, 16
# Move of the largest level, in steps, from one scale to the next where so few are affordable that they had better be
# independent.
SPARSE = 1 / 2


def affordable(budget: int, ample: int, cost: int) -> int:
    """Candidates within `budget` element evaluations; more than `ample` elements get less, to bound their time."""
    return budget * ample // (cost * max(cost, ample))


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
        errors = self.errors.nan_to_num(nan=math.inf, posinf=math.inf)  # of scales beyond what float32 can square
        slope = torch.zeros_like(self.z)
        if self.z.shape[1] > 1:
            slope = torch.gradient(self.z, spacing=self.spacing, dim=1)[0]
        within = errors <= errors.amin(1, keepdim=True) * (1 + tolerance)
        order = errors.argsort(dim=1, stable=True)[:, : max(int(within.sum(1).max()), 1)]
        return self.t.gather(1, order), self.z.gather(1, order), slope.gather(1, order)


class Effort:
    """How hard to look for the best of the candidates, by the scatter of their errors and by what is affordable.

    Attributes:
        tolerance: [cells, 1], how far above the least the smooth error of the best scale may lie, relative to it.
        count: candidates in all. width: of the beam that the refinement follows, `rounds` times at most.
        finest: least move in t. density: move of the largest level, in steps, between neighbours of the scan.
    """

    def __init__(self, space: GridSpace, samples: Tensor, cost: int) -> None:
        n = samples.clamp(min=1)[:, None].float()
        self.tolerance = SCATTER / n.sqrt() * (1 + SPREAD / n) * ~space.constant[:, None]
        self.widest = float(self.tolerance.max())
        self.count = min(max(affordable(BUDGET, AMPLE, cost), FEWEST), MOST)
        self.density, self.finest, width = 1 / 8, 1e-5, 8
        if self.widest > 1:  # a few dozen values: many narrow minima
            self.density, width = 1 / 32, min(max(self.count // 256, 8), 64)
        elif self.widest < 0.02:  # smooth: a flat minimum
            self.finest, width = 2.0 ** -(space.bits + 7), 2
        self.width = min(max(self.count // 64, 1), width)
        self.moves = self.width * (2 if space.axes == 1 else 8)
        self.rounds = min(max(self.count // (2 * self.moves), 1), MOST_ROUNDS)


def search_grid(space: GridSpace, smooth: ErrorSource, exact: ErrorSource, samples: Tensor) -> QRange:
    """Best quantizer per cell, [cells]; by `exact` never worse than the data's own range.

    Equal values get their own range, which holds them exactly; a histogram or a scale-free metric cannot tell.

    Args:
        smooth: errors for the first pass; exact: for the scan (may be the same).
        samples: [cells], values that carry an error (others than zero).
    """
    plain = QRange(*(part.squeeze(1) for part in space.minmax))
    effort = Effort(space, samples, exact.cost)
    beam = Beam(space, exact, torch.zeros_like(space.low), space.minmax.zero_point, effort.width)
    if not bool((beam.errors > 0).any()):
        return plain
    spacing = _scan(beam, *_first_pass(space, smooth, effort), effort)
    for _ in range(effort.rounds):
        spacing /= 2
        if spacing < effort.finest:
            break
        beam.refine(spacing, 1)
    found = (part.squeeze(1) for part in space.candidates(beam.t[:, :1], beam.z[:, :1]))
    return QRange(*(torch.where(space.constant, *pair) for pair in zip(plain, found, strict=True)))


Promising = tuple[tuple[Tensor, Tensor, Tensor], float]


def _first_pass(space: GridSpace, source: ErrorSource, effort: Effort) -> Promising:
    """Scales whose error is within the tolerance of the least, and their spacing; with little to spend the best one."""
    evaluations = 2 * space.bits + 1 if space.axes == 2 else 1
    most = affordable(COARSE_BUDGET, COARSE_AMPLE, source.cost) // evaluations
    if not source.convex:
        found, spacing = _vary_ends(space, source, ENDS_WIDTH)
        return found, max(spacing, min(2 * effort.widest, 1.0))
    if most >= FEWEST_SCALES:
        path = _whole_path(space, source, most)
        found, spacing = path.promising(effort.tolerance), path.spacing
        if spacing <= _goal(space):
            return found, spacing
        found, spacing = _halve(space, source, *found[:2], spacing, width=2)
    else:
        found, spacing = _vary_ends(space, source, width=1)
    share = 32 if space.axes == 2 else 2 * _scales(space, spacing, SPARSE)
    side = min(math.ceil(math.sqrt(min(effort.widest, 1.0)) / spacing), effort.count // share)
    if side == 0:
        return found, spacing
    around = found[0][:, :1] + spacing * torch.arange(-side, side + 1, device=space.low.device)
    path = _path(space, source, around.clamp_(max=math.log(LARGEST)), spacing)
    return path.promising(effort.tolerance), spacing


def _whole_path(space: GridSpace, source: ErrorSource, most: int) -> Path:
    """Walk down up to `most` scales from the largest to the smallest, and on while a cell's best is the lowest."""
    lowest, least = (math.log(scale) for scale in _smallest(source))
    count = min(math.ceil((math.log(LARGEST) - lowest) / _goal(space)), most)
    spacing = (math.log(LARGEST) - lowest) / count
    steps = spacing * torch.arange(count + 1, device=space.low.device)
    path = _path(space, source, lowest + steps, spacing)
    while lowest > least and bool((path.errors.argmin(1) == 0).any()):
        lowest -= spacing * count
        lower = _path(space, source, lowest + steps[:-1], spacing)
        t, z, errors = (torch.cat(parts, 1) for parts in zip(lower.parts(), path.parts(), strict=True))
        path = Path(t, z, errors, spacing)
    return path


def _smallest(source: ErrorSource) -> tuple[float, float]:
    """Return the smallest scale of the first pass, and how far it goes on down, as factors of the data's own."""
    if getattr(source, "metric", None) == "cosine":
        return SMALLEST_OF_COSINE, SMALLEST_OF_COSINE
    return SMALLEST, LEAST


def _path(space: GridSpace, source: ErrorSource, t: Tensor, spacing: float) -> Path:
    """Find the best zero point of every scale t, [k] or [cells, k], by bisection of the error's slope."""
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
    """Return the `width` best on a geometric grid of both ends, on while the best is the lowest, and their spacing."""
    fewest = FEWEST_ENDS if source.convex else MOST_ENDS ** (3 - space.axes)
    count = max(min(int((ENDS_BUDGET / source.cost) ** (1 / space.axes)), fewest), FEWEST_ENDS)
    size, lowest = -math.log(END_SPAN) / (count - 1), 0.0
    steps = -size * torch.arange(count, device=space.low.device)
    on_low, on_high = torch.cartesian_prod(steps, steps).T if space.axes == 2 else (steps, steps)
    beam = Beam(space, source, torch.zeros_like(space.low), space.minmax.zero_point, width)
    least = math.log(_smallest(source)[1])
    while lowest > least and bool((beam.t[:, 0] < lowest + size / 2).any()):
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
    """Count the scales within `spacing` from each of which to the next the largest level moves by `move` steps."""
    return max(round(spacing * 2 ** (space.bits - 1) / move), 1)


def _scan(beam: Beam, promising: tuple[Tensor, Tensor, Tensor], spacing: float, effort: Effort) -> float:
    """Offers scales within spacing / 2 of the promising ones; returns their own spacing."""
    space, (t, z, slope) = beam.space, promising
    count = effort.count - effort.rounds * effort.moves
    dense, sparse = (_scales(space, spacing, move) for move in (effort.density, SPARSE))
    variants = 3 if space.axes == 2 and 3 * dense * t.shape[1] <= count else 1
    kept = min(t.shape[1], max(count // (sparse * variants), 1))
    per_scale = min(dense, max(count // (kept * variants), 1))
    t, z, slope = (part[:, :kept, None, None] for part in (t, z, slope))
    offset = (torch.arange(per_scale, device=t.device) - (per_scale - 1) / 2)[:, None] * (spacing / per_scale)
    shift = torch.arange(variants, device=t.device) - variants // 2
    z = space.clamp((z + slope * offset + shift).flatten(1))
    t = (t + offset).expand(*t.shape[:2], per_scale, variants).flatten(1)
    beam.offer(t.clamp(max=math.log(LARGEST)), z)
    return spacing / per_scale
