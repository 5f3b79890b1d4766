"""`Corrected`: a quantized denoiser with the mean of its noise taken out, again a denoiser."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq_exp.correction.statistics import NoiseStatistics
from ptq_exp.diffusion import TimeGrid, step_coefficients
from ptq_exp.errors import ConfigError


class Corrected(nn.Module):
    """eps = (eps_q - bias) / (1 + k), with the statistics of the step (PTQD, section 4.2).

    Goes around guidance: what is corrected is the estimate that the sampler receives.

    Args:
        denoiser: (x [N, C, H, W], t [N] network time, conditions by name) -> eps_q [N, C, H, W].
        statistics: of the same denoiser on the same grid.
        grid: the one that is sampled with; positions are found by network time.

    Raises:
        ConfigError: the statistics belong to another number of steps, or a slope is -1 or less (the quantized
            estimate carries nothing of the full-precision one).
    """

    def __init__(self, denoiser: nn.Module, statistics: NoiseStatistics, grid: TimeGrid) -> None:
        super().__init__()
        if len(statistics) != len(grid):
            raise ConfigError(
                f"the noise statistics are those of {len(statistics)} sampling steps, but the sampler takes "
                f"{len(grid)}: fit them on the grid that is sampled with (correction.statistics=null), or change "
                "sampler.steps"
            )
        lost = torch.nonzero(~(1 + statistics.slope > 0)).flatten().tolist()
        if lost:
            raise ConfigError(
                f"k is -1 or less in the steps {lost}: the quantized estimate carries nothing of the full-precision "
                "one there; use more bits, or correction.shrink=true"
            )
        self.denoiser, self.grid = denoiser, grid
        self.register_buffer("bias", statistics.bias.float(), persistent=False)
        self.register_buffer("gain", 1 / (1 + statistics.slope.float()), persistent=False)

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        """Corrected eps [N, C, H, W].

        Raises:
            ConfigError: a time that is not on the grid of the statistics, or another number of channels.
        """
        eps = self.denoiser(x, t, **conditions)
        if eps.shape[1] != self.bias.shape[1]:
            raise ConfigError(
                f"the noise statistics have {self.bias.shape[1]} channels, but the estimate has {eps.shape[1]}: they "
                "belong to another model"
            )
        step = self.grid.step_of(t)
        inner = [1] * (eps.ndim - 2)
        return (eps - self.bias[step].view(len(step), -1, *inner)) * self.gain[step].view(-1, 1, *inner)


@dataclass(frozen=True)
class VarianceFit:
    """How much of the residual noise a sampler's own step noise can take up; float64 [S], variances of x_prev.

    Attributes:
        available: sigma^2, what the full-precision step adds.
        needed: c^2 q^2, what the noise q left in eps brings into x_prev through its coefficient c.
    """

    available: Tensor
    needed: Tensor

    @classmethod
    def of(cls, grid: TimeGrid, eps_noise_std: Tensor) -> VarianceFit:
        """Compute the steps of `grid` with noise of standard deviation `eps_noise_std` [S] in eps."""
        rows = zip(grid.alphas_cumprod.tolist(), grid.alphas_cumprod_prev.tolist(), strict=True)
        steps = [step_coefficients(level, previous, grid.eta) for level, previous in rows]
        sigma = torch.tensor([step.sigma for step in steps], dtype=torch.float64)
        c = torch.tensor([step.eps for step in steps], dtype=torch.float64)
        return cls(sigma**2, (c * eps_noise_std.double()) ** 2)

    @property
    def left(self) -> Tensor:
        """What does not fit and stays in the image as additional noise."""
        return (self.needed - self.available).clamp(min=0)

    def summary(self) -> str:
        """One line: how many steps fit, and the share of the noise that is left over."""
        if not bool((self.available > 0).any()):
            return (
                "variance correction: the sampler adds no noise of its own that could make room (eta = 0): only the "
                "mean is corrected"
            )
        over = self.left > 0
        share = float(self.left.sum() / self.needed.sum()) if bool((self.needed > 0).any()) else 0.0
        line = f"variance correction: fits in {int((~over).sum())} of {len(over)} steps"
        return line if not bool(over.any()) else (
            f"{line}; in the steps {torch.nonzero(over).flatten().tolist()} the quantization noise is larger than the "
            f"sampler's own: all of that is replaced, and {share:.1%} of the quantization variance is left over"
        )

    def to_dict(self) -> dict:
        """Plain lists and counts (JSON)."""
        return {
            "available": self.available.tolist(),
            "needed": self.needed.tolist(),
            "steps_over": int((self.left > 0).sum()),
            "left": float(self.left.sum()),
        }
