"""`TimeGrid`: the only home of the time convention.

A grid lists the S sampling steps in the order in which sampling runs, noisiest first. Step s takes a state that
carries the network time `timesteps[s]` from noise level `alphas_cumprod[s]` to `alphas_cumprod_prev[s]`. Calibration
labels, statistics and schedules are all indexed by the position s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ptq_exp.errors import ConfigError

SPACINGS = ("leading", "linspace", "quad", "trailing")
_QUAD_SHARE = 0.8
_TENSORS = ("timesteps", "alphas_cumprod", "alphas_cumprod_prev")


@dataclass(frozen=True)
class NoiseSchedule:
    """The training schedule of a model, and how its published samplers read it.

    Attributes:
        alphas_cumprod: float64 [T], decreasing.
        time_scale: network time per index of the schedule (improved-diffusion feeds index * 1000 / T).
        steps_offset: the first index of `leading` spacing (1 in latent diffusion's DDIM, 0 in the others).
        final_alpha_cumprod: noise level after the last step: 1, or alphas_cumprod[0] in latent diffusion.
        rederive_eps: where x0 is clipped, eps is derived from it again; False = the network's own stays beside it, as
            in the DDIM of diffusers. See `ptq_exp.diffusion.ddim_step`.
        constant_stride: a step from t ends at the level of t - floor(T / steps), whatever the next time of the grid
            is, as in the DDIM of diffusers; it differs in `linspace`, and in `trailing` where steps do not divide T.
    """

    alphas_cumprod: Tensor
    time_scale: float = 1.0
    steps_offset: int = 1
    final_alpha_cumprod: float = 1.0
    rederive_eps: bool = True
    constant_stride: bool = False

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def betas(self) -> Tensor:
        """beta_t = 1 - alpha_bar_t / alpha_bar_(t-1), float64 [T]."""
        levels = self.alphas_cumprod.double()
        return 1 - levels / torch.cat([levels.new_ones(1), levels[:-1]])

    @classmethod
    def latent_diffusion(cls, total: int = 1000) -> NoiseSchedule:
        """Make that of Rombach et al. 2022: roots of the betas evenly spaced; it ends at alphas_cumprod[0]."""
        betas = torch.linspace(0.0015**0.5, 0.0195**0.5, total, dtype=torch.float64) ** 2
        alphas_cumprod = (1 - betas).cumprod(0)
        return cls(alphas_cumprod, final_alpha_cumprod=float(alphas_cumprod[0]))


@dataclass(frozen=True)
class TimeGrid:
    """`timesteps`, `alphas_cumprod`, `alphas_cumprod_prev`: float64 [S], noisiest step first; `eta` of DDIM.

    `timesteps` holds what the network receives and may be fractional (respaced and rescaled schedules); times may
    repeat. `eta` in [0, 1] is the share of DDPM's noise that each step adds (Song et al. 2021, eq. 16);
    `rederive_eps` as in `NoiseSchedule`.

    `solver` names what walks the grid, one step per network evaluation: "ddim", or a scheduler of diffusers, of which
    `make_scheduler` builds a fresh one; see `ptq_exp.diffusion.solvers`.
    """

    timesteps: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    eta: float = 0.0
    solver: str = "ddim"
    make_scheduler: Callable[[], Any] | None = field(default=None, compare=False, repr=False)
    rederive_eps: bool = True

    def __len__(self) -> int:
        return len(self.timesteps)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: times, noise levels, `eta`, and the name of the solver."""
        return {key: getattr(self, key).tolist() for key in _TENSORS} | {"eta": self.eta, "solver": self.solver}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> TimeGrid:
        """Return the grid of what `to_dict` gave; a scheduler of diffusers is not made again.

        Raises:
            KeyError, TypeError, ValueError: an entry is missing or of another type.
        """
        tensors = (torch.tensor(entry[key], dtype=torch.float64) for key in _TENSORS)
        return cls(*tensors, float(entry["eta"]), str(entry["solver"]))

    def network_time(self, step: int | Tensor, n: int = 1) -> Tensor:
        """Network time as float32 [n] for one `step`, or [len(step)] for a tensor of steps."""
        if isinstance(step, Tensor):
            return self.timesteps[step].float()
        return self.timesteps[step].float().expand(n)

    @cached_property
    def first_with_time(self) -> Tensor:
        """For each position the first one with the same float32 network time, int64 [S]."""
        return self.step_of(self.timesteps)

    def step_of(self, t: Tensor) -> Tensor:
        """Positions of the network times `t` [N] (float32, any device): int64 [N] there, the first where times repeat.

        Raises:
            ConfigError: a time that is not on the grid.
        """
        # looked up on the CPU: fetching the times is the only wait for the device
        wanted = t.detach().cpu().float()
        equal = wanted.view(-1, 1) == self.timesteps.float()
        missing = ~equal.any(1)
        if bool(missing.any()):
            raise ConfigError(
                f"the network time {float(wanted[missing][0]):g} is not on the grid of {len(self)} steps from "
                f"{float(self.timesteps[0]):g} to {float(self.timesteps[-1]):g}: the statistics or schedule belong to "
                "another grid; sample with the sampler.steps and sampler.spacing that they were made with"
            )
        return equal.int().argmax(1).to(t.device, non_blocking=True)

    @classmethod
    def from_schedule(
        cls, schedule: NoiseSchedule, steps: int, spacing: str = "linspace", *, eta: float = 0.0
    ) -> TimeGrid:
        """Respace a training schedule of T times to `steps`; the next level is that of the next time of the grid.

        Args:
            spacing: `linspace`, evenly spaced, both ends included: round(i (T - 1) / (steps - 1)) (Nichol and Dhariwal
                2021, section 4; one step uses T - 1); `leading`: offset + i floor(T / steps), as latent diffusion and
                DDIM's `uniform` run (the offset is lowered where it does not fit); `quad`:
                floor((i sqrt(0.8 T) / (steps - 1))^2), DDIM's CIFAR-10 spacing, whose first times repeat; `trailing`:
                round(T - i T / steps) - 1, which starts at T - 1 (Lin et al. 2024, table 2).

        Raises:
            ConfigError: `steps` is not in 1..T, eta is not in [0, 1], or an unknown spacing.
        """
        total = len(schedule)
        if not 1 <= steps <= total:
            raise ConfigError(f"sampler.steps={steps}: choose 1..{total}, the length of the model's training schedule")
        if spacing not in SPACINGS:
            raise ConfigError(f"sampler.spacing={spacing}: choose one of {', '.join(SPACINGS)}")
        if not 0 <= eta <= 1:
            raise ConfigError(f"sampler.eta={eta}: choose 0..1")
        index = _spaced(total, steps, spacing, schedule.steps_offset).flip(0)
        all_levels = schedule.alphas_cumprod.double()
        levels, final = all_levels[index.long()], all_levels.new_tensor([schedule.final_alpha_cumprod])
        previous = torch.cat([levels[1:], final])
        if schedule.constant_stride and spacing != "quad":
            end = index.long() - total // steps
            previous = torch.where(end >= 0, all_levels[end.clamp(min=0)], final)
        return cls(index * schedule.time_scale, levels, previous, eta, rederive_eps=schedule.rederive_eps)


def _spaced(total: int, steps: int, spacing: str, offset: int) -> Tensor:
    """Return indices of the schedule, float64 [steps], cleanest first; see `TimeGrid.from_schedule`."""
    positions = torch.arange(steps).double()
    if spacing == "leading":
        stride = total // steps
        return positions * stride + min(offset, total - 1 - (steps - 1) * stride)
    if spacing == "quad":
        return (torch.linspace(0, (_QUAD_SHARE * total) ** 0.5, steps, dtype=torch.float64) ** 2).floor()
    if spacing == "trailing":
        return (total - positions * total / steps).round().flip(0) - 1
    # one division per time, so that halves are exact; a running stride misses them
    return (total - 1 - positions * (total - 1) / max(steps - 1, 1)).round().flip(0)
