"""The gain and offset of noise estimates that bring the states after one sampling step nearest to wanted ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ptq_exp.correction.shrinkage import trusted
from ptq_exp.correction.statistics import NoiseStatistics
from ptq_exp.diffusion import ddim_step, step_coefficients

_TURNS = 8
"""Most times that the elements which are clamped are found anew."""


class Line(NamedTuple):
    """eps' = gain eps_q + offset, float64.

    Attributes:
        gain, offset, gain_stderr, offset_stderr: [], [C], and their standard errors.
        unshrunk: the gain before shrinkage.
        r: correlation of the error of eps_q with the wanted estimate.
        residual_std, kurtosis: of what is left, in units of eps.
    """

    gain: Tensor
    offset: Tensor
    gain_stderr: Tensor
    offset_stderr: Tensor
    unshrunk: Tensor
    r: Tensor
    residual_std: Tensor
    kurtosis: Tensor


@dataclass(frozen=True)
class Seen:
    """A batch in one DDIM step: states [N, C, ...], quantized estimates, wanted next states, and the step itself."""

    x: Tensor
    eps: Tensor
    wanted: Tensor
    noise: Tensor | None
    alpha_bar: float
    alpha_bar_prev: float
    eta: float
    clip_sample: bool = False
    rederive_eps: bool = True

    def next_state(self, line: Line) -> Tensor:
        """Return the state after the step with corrected estimates."""
        return self._step(self._corrected(line))

    def linearised(self, line: Line) -> tuple[Tensor, Tensor, Tensor]:
        """Linearise the step around corrected estimates: weights and targets of eps, and the error, float64.

        The next state is the wanted one where eps equals the target; an error of eps counts by the root of its weight,
        1 in elements that are free and 0 where the clamp keeps the state from following.
        """
        eps = self._corrected(line)
        state = self._step(eps)
        coefficients = step_coefficients(self.alpha_bar, self.alpha_bar_prev, self.eta)
        slope = torch.full_like(eps, coefficients.eps)
        if self.clip_sample:
            x0 = (self.x - (1 - self.alpha_bar) ** 0.5 * eps) / self.alpha_bar**0.5
            slope[x0.abs() > 1] = 0.0 if self.rederive_eps else coefficients.direction
        miss = self.wanted - state
        target = torch.where(slope == 0, eps, eps + miss / torch.where(slope == 0, 1.0, slope))
        return ((slope / coefficients.eps) ** 2).double(), target.double(), miss.double()

    def _corrected(self, line: Line) -> Tensor:
        offset = line.offset.to(self.eps).view(1, -1, *[1] * (self.eps.ndim - 2))
        return self.eps * line.gain.to(self.eps) + offset

    def _step(self, eps: Tensor) -> Tensor:
        return ddim_step(
            self.x, eps, self.alpha_bar, self.alpha_bar_prev, self.eta, self.noise, clip_sample=self.clip_sample,
            rederive_eps=self.rederive_eps,
        )[0]


def fit_line(batches: Sequence[Seen], *, correlation: bool, bias: bool, shrink: bool) -> Line:
    """Fit gain and offset by Gauss-Newton: least squares with the elements that are free at the last fit, till it ends.

    Args:
        batches: of the same step.
        correlation, bias: False = gain 1, offset 0.
        shrink: pull gain - 1 and offset towards 0 as far as they are unsure, see `trusted`.
    """
    best = start = _identity(batches[0])
    least, line = _miss(batches, start), start
    for _ in range(_TURNS):
        line = _least_squares(batches, line, correlation=correlation, bias=bias)
        miss = _miss(batches, line)
        if not miss < least:
            break
        best, least = line, miss
    if not shrink:
        return best
    gain = 1 + trusted(best.gain - 1, best.gain_stderr)
    return best._replace(gain=gain, offset=trusted(best.offset, best.offset_stderr))


def statistics_of(lines: Sequence[Line], samples: int) -> NoiseStatistics:
    """Return the statistics whose correction has these gains and offsets: k = 1 / gain - 1, bias = -offset / gain."""
    gain, offset, gain_error, offset_error, unshrunk, r, std, kurtosis = (
        torch.stack(values).cpu() for values in zip(*lines, strict=True)
    )
    return NoiseStatistics(
        k=1 / gain - 1, bias=-offset / gain[:, None], residual_std=std / gain, r=r, kurtosis=kurtosis,
        k_stderr=gain_error / gain**2, bias_stderr=offset_error / gain[:, None], k_unshrunk=1 / unshrunk - 1,
        counts=torch.full((len(lines),), samples),
    )


def _identity(seen: Seen) -> Line:
    zero = torch.zeros((), dtype=torch.float64, device=seen.eps.device)
    zeros = zero.expand(seen.eps.shape[1]).clone()
    return Line(zero + 1, zeros, zero, zeros, zero + 1, zero, zero, zero)


def _miss(batches: Sequence[Seen], line: Line) -> float:
    """Return the mean squared distance of the next states from the wanted ones."""
    total = sum(float((batch.next_state(line) - batch.wanted).double().square().sum()) for batch in batches)
    return total / sum(batch.wanted.numel() for batch in batches)


def _least_squares(batches: Sequence[Seen], line: Line, *, correlation: bool, bias: bool) -> Line:
    """Weighted least squares of the targets on the estimates, with an offset for each channel."""
    weight, target, _ = (torch.cat(parts).flatten(2) for parts in zip(
        *(batch.linearised(line) for batch in batches), strict=True
    ))
    eps = torch.cat([batch.eps for batch in batches]).double().flatten(2)
    mass = weight.sum((0, 2)).clamp(min=1e-12)
    mean_eps, mean_target = ((weight * values).sum((0, 2)) / mass for values in (eps, target))
    if not bias:
        mean_eps, mean_target = torch.zeros_like(mean_eps), torch.zeros_like(mean_target)
    x = eps - mean_eps[:, None]
    spread = (weight * x * x).sum()
    gain = eps.new_ones(())
    if correlation and spread > 0:
        gain = (weight * x * (target - mean_target[:, None])).sum() / spread
    offset = mean_target - gain * mean_eps
    left = target - gain * eps - offset[:, None]
    # samples are what is independent, not pixels (Liang and Zeger 1986)
    of_gain = (weight * x * left).sum((1, 2)).square().sum().sqrt() / spread.clamp(min=1e-300)
    of_offset = (weight * left).sum(2).square().sum(0).sqrt() / mass
    one = len(eps) < 2
    return Line(
        gain, offset, torch.full_like(of_gain, torch.inf) if one else of_gain * correlation,
        torch.full_like(of_offset, torch.inf) if one else of_offset * bias, gain.clone(),
        _correlation(weight, eps - target, target), *_left(weight, left),
    )


def _correlation(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    total = weight.sum().clamp(min=1e-12)
    a, b = (values - (weight * values).sum() / total for values in (a, b))
    product = (weight * a * a).sum() * (weight * b * b).sum()
    return torch.where(product > 0, (weight * a * b).sum() / product.clamp(min=1e-300).sqrt(), 0.0)


def _left(weight: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """Return standard deviation and excess kurtosis of the weighted residual."""
    total = weight.sum().clamp(min=1e-12)
    variance, fourth = (weight * left**2).sum() / total, (weight * left**4).sum() / total
    return variance.sqrt(), torch.where(variance > 0, fourth / variance.clamp(min=1e-300) ** 2 - 3, 0.0)

