"""Share of a fixed pattern in the error of a noise estimate: what is the same for all samples adds up over steps."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ptq_exp.correction.fit import mean_square_error
from ptq_exp.correction.moments import Chunk
from ptq_exp.correction.statistics import NoiseStatistics


def fixed_pattern_share(
    error_sum: Tensor, n: int, chunks: Iterable[Chunk], n_steps: int, statistics: NoiseStatistics | None = None,
    eps_sum: Tensor | None = None,
) -> Tensor:
    """Norm of the mean error over the root mean squared norm of the error, of each step, float64 [S], 0 to 1.

    ||mean_i e_i|| / sqrt(mean_i ||e_i||^2) over the n samples i: 1 where all samples have the same error, 0 where there
    is none. Errors that have nothing in common still give about 1 / sqrt(n), see `share_of_noise`: that is not taken
    off.

    Args:
        error_sum: sum over samples of eps_q - eps, float64 [S, C, ...].
        n: number of samples.
        chunks: moments of the same samples and steps.
        n_steps: S.
        statistics: of a correction, then e = (eps_q - bias) / (1 + slope) - eps; None: e = eps_q - eps.
        eps_sum: sum over samples of eps, as `error_sum`; needed with `statistics` alone.
    """
    mean = error_sum.flatten(2) / n
    if statistics is not None:
        slope = statistics.slope.view(-1, 1, 1)
        mean = (mean - slope * eps_sum.flatten(2) / n - statistics.bias.unsqueeze(2)) / (1 + slope)
    pattern, total = mean.square().mean((1, 2)), mean_square_error(chunks, n_steps, statistics)
    return torch.where(total > 0, pattern / total, 0.0).sqrt().clamp(max=1)  # rounding may exceed 1


def share_of_noise(n: int) -> float:
    """Return the share of errors of n samples with nothing in common, 1 / sqrt(n): in expectation of its square."""
    return n**-0.5
