"""`TimeGrid`: the only home of the time convention.

A grid lists the S sampling steps in the order in which sampling runs, noisiest first. Step s takes a state that
carries the network time `timesteps[s]` from noise level `alphas_cumprod[s]` to `alphas_cumprod_prev[s]`. Calibration
labels, statistics and schedules are all indexed by the position s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq_exp.errors import ConfigError

SPACINGS = ("leading", "linspace")


@dataclass(frozen=True)
class TimeGrid:
    """`timesteps`, `alphas_cumprod`, `alphas_cumprod_prev`: float64 [S], noisiest step first.

    `timesteps` holds what the network receives and may be fractional (respaced and rescaled schedules).
    """

    timesteps: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor

    def __len__(self) -> int:
        return len(self.timesteps)

    def network_time(self, step: int | Tensor, n: int = 1) -> Tensor:
        """Network time as float32 [n] for one `step`, or [len(step)] for a tensor of steps."""
        if isinstance(step, Tensor):
            return self.timesteps[step].float()
        return self.timesteps[step].float().expand(n)

    @classmethod
    def from_alphas_cumprod(
        cls, alphas_cumprod: Tensor, steps: int, spacing: str = "linspace", *, final_alpha_cumprod: float = 1.0
    ) -> TimeGrid:
        """Respace a training schedule [T] to `steps` evenly spaced times.

        `alphas_cumprod_prev` comes from the next time of the grid, never from a constant stride.

        Args:
            spacing: `linspace`, both ends included: round(i (T - 1) / (steps - 1)) (Nichol and Dhariwal 2021, section
                4; one step uses T - 1); `leading`: 1 + i floor(T / steps), as latent diffusion runs DDIM (0 for the
                first time where 1 does not fit).

        Raises:
            ConfigError: `steps` is not in 1..T, or an unknown spacing.
        """
        total = len(alphas_cumprod)
        if not 1 <= steps <= total:
            raise ConfigError(f"sampler.steps={steps}: choose 1..{total}, the length of the model's training schedule")
        if spacing not in SPACINGS:
            raise ConfigError(f"sampler.spacing={spacing}: choose one of {', '.join(SPACINGS)}")
        positions = torch.arange(steps).double()
        if spacing == "leading":
            stride = total // steps
            spaced = (positions * stride + min(1, total - 1 - (steps - 1) * stride)).flip(0)
        else:
            # one division per time, so that halves are exact; a running stride misses them
            spaced = (total - 1 - positions * (total - 1) / max(steps - 1, 1)).round()
        levels = alphas_cumprod.double()[spaced.long()]
        previous = torch.cat([levels[1:], levels.new_tensor([final_alpha_cumprod])])
        return cls(spaced, levels, previous)
