"""Joint moments of a noise estimate and its quantization error: all that the statistics of a step are made of.

For each sample and channel, the mean over pixels of eps^i error^j for all i + j <= 4, where eps is the full-precision
estimate and error = eps_q - eps. The sums of any linear combination of the two follow in closed form, so that slopes,
biases, variances and kurtoses can be refitted, and errors before and after a correction compared, without the images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import comb

import numpy as np
import torch
from torch import Tensor

from ptq_exp.errors import DataError
from ptq_exp.storage.pieces import slices

ORDER = 4
POWERS = tuple((i, j) for i in range(ORDER + 1) for j in range(ORDER + 1 - i))
"""The (i, j) of the last dimension of a moments tensor."""
_POSITION = {powers: position for position, powers in enumerate(POWERS)}
_CHUNK = 64

Chunk = tuple[Tensor, Tensor]
"""(step int64 [N], moments float64 [N, C, len(POWERS)]): each row is one sample at one step."""


def sample_moments(eps: Tensor, eps_q: Tensor) -> Tensor:
    """Moments of each sample and channel, float64 [N, C, len(POWERS)].

    Args:
        eps: full-precision noise estimate [N, C, ...], after guidance.
        eps_q: quantized noise estimate of the same states, of the same shape.

    Raises:
        DataError: the shapes differ, or a value is NaN or infinite.
    """
    if eps.shape != eps_q.shape or eps.ndim < 3:
        raise DataError(
            f"noise estimates must be two tensors [N, C, ...] of one shape, found {tuple(eps.shape)} and "
            f"{tuple(eps_q.shape)}"
        )
    x = eps.double().flatten(2)
    error = eps_q.double().flatten(2) - x
    of_x, of_error = _powers(x), _powers(error)
    moments = torch.stack([(of_x[i] * of_error[j]).mean(-1) for i, j in POWERS], dim=-1)
    if not bool(moments.isfinite().all()):
        raise DataError("a noise estimate holds NaN or infinity: the statistics of its error cannot be computed")
    return moments


def at(moments: Tensor, i: int, j: int) -> Tensor:
    """E[eps^i error^j]: moments [..., len(POWERS)] -> [...]."""
    return moments[..., _POSITION[i, j]]


def residual_moment(moments: Tensor, order: int, k: Tensor, bias: Tensor) -> Tensor:
    """E[(error - k eps - bias)^order] by the binomial theorem, twice.

    Args:
        moments: [..., len(POWERS)].
        order: 1 to 4.
        k, bias: broadcast against [...].
    """
    total = torch.zeros(())
    for from_bias in range(order + 1):
        rest = order - from_bias
        for from_eps in range(rest + 1):
            weight = comb(order, from_bias) * comb(rest, from_eps)
            total = total + weight * (-bias) ** from_bias * (-k) ** from_eps * at(moments, from_eps, rest - from_eps)
    return total


class MomentChunks:
    """The moments of n samples at all S steps of a grid, read a few samples at a time, as often as wanted.

    Args:
        moments: array-like [n, W, S, C, len(POWERS)] of W quantized denoisers, such as a memory-mapped file.
        rows: which of the W denoisers runs each step, int64 [S]; None = the first.
    """

    def __init__(self, moments: np.ndarray, rows: Tensor | None = None) -> None:
        self.moments = moments
        self.rows = torch.zeros(moments.shape[2], dtype=torch.long) if rows is None else rows

    def __iter__(self) -> Iterator[Chunk]:
        steps = torch.arange(self.moments.shape[2])
        for some in slices(len(self.moments), _CHUNK):
            chunk = torch.from_numpy(np.array(self.moments[some]))[:, self.rows, steps]
            yield steps.repeat(len(chunk)), chunk.flatten(0, 1)


class Merged:
    """Chunks whose positions of one network time are counted with the first of them.

    Args:
        chunks: re-iterable.
        repeats: int64 [S], for each position the first one with its network time (`TimeGrid.first_with_time`).
    """

    def __init__(self, chunks: Iterable[Chunk], repeats: Tensor) -> None:
        self.chunks, self.repeats = chunks, repeats

    def __iter__(self) -> Iterator[Chunk]:
        return ((self.repeats[step], moments) for step, moments in self.chunks)


def pooled(chunks: Iterable[Chunk], n_steps: int) -> tuple[Tensor, Tensor]:
    """Moments over all samples of each step, float64 [S, C, len(POWERS)] (NaN where there is none), and counts [S].

    Raises:
        DataError: a step is outside 0..n_steps-1, or there are no samples at all.
    """
    sums, counts = None, torch.zeros(n_steps, dtype=torch.float64)
    for step, moments in chunks:
        if len(step) and not 0 <= int(step.min()) <= int(step.max()) < n_steps:
            raise DataError(
                f"noise estimates of the steps {int(step.min())} to {int(step.max())}, but the grid has the steps 0 to "
                f"{n_steps - 1}"
            )
        sums = torch.zeros(n_steps, *moments.shape[1:], dtype=torch.float64) if sums is None else sums
        sums.index_add_(0, step, moments)
        counts.index_add_(0, step, torch.ones_like(step, dtype=torch.float64))
    if sums is None:
        raise DataError("there are no noise estimates to compute statistics from")
    return sums / counts.view(-1, 1, 1), counts


def _powers(x: Tensor) -> list[Tensor]:
    powers = [torch.ones_like(x)]
    for _ in range(ORDER):
        powers.append(powers[-1] * x)
    return powers
