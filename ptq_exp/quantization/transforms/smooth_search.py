"""The strength of smoothing by search: the pair of exponents with which quantized layers answer best.

Factors s = max|x|^a / max|w|^b of each channel, over a grid of 39 pairs (a, b); the error is that of the output,
||x W^T - Q(x / s) Q(W s)^T||^2, summed over the layers that read the channels (deepcompressor). With a low-rank branch
inside, the branch takes the side of the weights, so that more goes into them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import isfinite

import torch
from torch import Tensor, nn

from ptq_exp.quantization.specs import QuantSpec
from ptq_exp.quantization.transforms.inputs import Read, matrix_of
from ptq_exp.quantization.transforms.low_rank_split import truncated
from ptq_exp.quantization.transforms.rounding import input_rounding, weight_rounding

STEPS = 20


def exponents() -> Iterator[tuple[float, float]]:
    """Yield the pairs (a, b): none, then (a, 0), then (a, 1 - a)."""
    yield 0.0, 0.0
    shares = [step / STEPS for step in range(1, STEPS)]
    yield from ((share, 0.0) for share in shares)
    yield from ((share, 1 - share) for share in shares)


def factors_of(of_input: Tensor, of_weight: Tensor, a: float, b: float) -> Tensor:
    """Return s [C] = max|x|^a / max|w|^b, float64; 1 for a channel where that is 0, all 1 where one is not finite.

    Args:
        of_input, of_weight: largest magnitudes of each channel, [C].
    """
    factors = of_input.double() ** a / of_weight.double() ** b
    factors = torch.where(factors == 0, 1.0, factors)
    return factors if bool(factors.isfinite().all()) else torch.ones_like(factors)


def best_factors(of_input: Tensor, of_weight: Tensor, error: Callable[[Tensor], float]) -> Tensor:
    """Return the factors of the grid with the least error; the last of equal ones, 1 where no error is finite."""
    best, least = torch.ones_like(of_input, dtype=torch.float64), float("inf")
    for a, b in exponents():
        factors = factors_of(of_input, of_weight, a, b)
        now = error(factors)
        if isfinite(now) and now <= least:
            best, least = factors, now
    return best


@torch.no_grad()
def searched_factors(
    layers: Sequence[nn.Module], quantized: Sequence[nn.Module], specs: Sequence[QuantSpec], read: Read, rank: int
) -> Tensor:
    """Return the factors [C] for `layers`, which read the same.

    Args:
        quantized: those of the layers that are, by `specs`; none: all factors are 1.
        read: what the layers multiply on the calibration set.
        rank: of the branch in the search; 0 = none.
    """
    weights = [layer.weight.detach().abs().movedim(1, 0).flatten(1).amax(1) for layer in layers]
    of_weight = torch.stack(weights).amax(0)
    if not quantized or not len(read.rows):
        return torch.ones_like(of_weight, dtype=torch.float64)
    rows = read.rows.double()
    parts = [(matrix_of(layer), layer, spec) for layer, spec in zip(quantized, specs, strict=True)]
    wanted = [rows @ weight.T for weight, _, _ in parts]
    taps = rows.shape[1] // len(of_weight)

    def error(factors: Tensor) -> float:
        spread = factors.repeat_interleave(taps)
        x, found = rows / spread, 0.0
        for y, (weight, layer, spec) in zip(wanted, parts, strict=True):
            smoothed, rest = weight * spread, y
            if rank:
                up, down = truncated(smoothed, min(rank, *smoothed.shape))
                smoothed, rest = smoothed - up @ down, y - (x @ down.T) @ up.T
            answer = input_rounding(layer, spec, x)(x) @ weight_rounding(layer, spec)(smoothed).T
            found += float((rest - answer).square().sum())
        return found

    return best_factors(read.largest.to(of_weight.device), of_weight, error)
