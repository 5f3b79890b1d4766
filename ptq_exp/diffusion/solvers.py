"""Deterministic solvers of diffusers as time grids: DPM-Solver++ (second order), PLMS and Euler.

A grid lists one step per network evaluation, with the times and noise levels that the scheduler really uses, and makes
a fresh scheduler for every run. None of these solvers clamps the predicted x0: where a schedule ends in pure noise
(cosine), the times of `trailing` and `linspace` start at levels that multiply an error of eps by 1 / sqrt(alpha_bar),
and `leading` does not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ptq_exp.diffusion.time_grid import NoiseSchedule, TimeGrid
from ptq_exp.errors import ConfigError

if TYPE_CHECKING:  # imported where they are made: they bring scipy.stats, and DDIM needs none of them
    from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler

log = logging.getLogger(__name__)
SOLVER_SPACINGS = ("leading", "linspace", "trailing")
# what Lu et al. 2022 (DPM-Solver) cut: cosine schedules reach log(alpha / sigma) = -10, where x0 cannot be estimated
_LOWEST_LOG_SNR = -5.1
# x0 = (x - eps) / sqrt(alpha_bar) multiplies an error of eps a thousand times
_NO_SIGNAL = 1e-6


def _dpm_solver(final_zero: bool, **settings: Any) -> DPMSolverMultistepScheduler:
    """DPM-Solver++(2M), Lu et al. 2022b, algorithm 2."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        solver_order=2, algorithm_type="dpmsolver++", lambda_min_clipped=_LOWEST_LOG_SNR,
        final_sigmas_type="zero" if final_zero else "sigma_min", **settings,
    )


def _pndm(final_zero: bool, **settings: Any) -> PNDMScheduler:
    """PLMS, Liu et al. 2022: linear multistep of order four; its second time is evaluated twice to get started."""
    from diffusers import PNDMScheduler

    return PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=final_zero, **settings)


def _euler(final_zero: bool, **settings: Any) -> EulerDiscreteScheduler:
    """Euler steps of Karras et al. 2022, on states x0 + sigma eps."""
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(final_sigmas_type="zero" if final_zero else "sigma_min", **settings)


_FACTORIES: dict[str, Callable[..., Any]] = {"dpm_solver": _dpm_solver, "pndm": _pndm, "euler": _euler}
SOLVERS = ("ddim", *_FACTORIES)
"""Names of what walks a time grid; `ddim` is `ptq_exp.diffusion.ddim_step`."""


def solver_grid(
    schedule: NoiseSchedule, steps: int, spacing: str, *, eta: float = 0.0, solver: str = "ddim"
) -> TimeGrid:
    """Return the grid that `solver` walks in `steps` steps.

    `ddim`: see `TimeGrid.from_schedule`. The others space the times as their scheduler does. `dpm_solver` leaves the
    clean end to its last step and starts no deeper in the noise than log(alpha / sigma) = -5.1; its `leading` times are
    offset + i floor(T / (steps + 1)), i = 1..steps, which end far below T where that division leaves a large rest (250
    steps of 1000: 751). `euler` has fractional times with `linspace`. `pndm` evaluates S = steps + 1 times, the second
    one twice.

    Raises:
        ConfigError: an unknown solver or spacing, an impossible number of steps, times that the solver cannot follow,
            or eta > 0 with a deterministic solver.
    """
    if solver not in SOLVERS:
        raise ConfigError(f"sampler={solver}: choose one of {', '.join(SOLVERS)}")
    if solver == "ddim":
        return TimeGrid.from_schedule(schedule, steps, spacing, eta=eta)
    if eta != 0:
        raise ConfigError(f"sampler.eta={eta:g}: sampler={solver} is deterministic; choose 0, or sampler=ddim")
    if spacing not in SOLVER_SPACINGS:
        raise ConfigError(f"sampler.spacing={spacing}: sampler={solver} takes leading, linspace or trailing")
    total = len(schedule)
    if not 1 <= steps <= total:
        raise ConfigError(f"sampler.steps={steps}: choose 1..{total}, the length of the model's training schedule")
    make_scheduler = partial(
        _scheduler, solver, steps, final_zero=schedule.final_alpha_cumprod == 1, trained_betas=schedule.betas.numpy(),
        num_train_timesteps=total, timestep_spacing=spacing, steps_offset=_offset(schedule, steps, solver),
    )
    scheduler = make_scheduler()
    _check_times(scheduler, solver, steps, spacing)
    levels = _levels(scheduler)
    if float(levels[0]) < _NO_SIGNAL:
        log.warning(
            "sampler=%s with sampler.spacing=%s starts at alpha_bar=%.1g and does not clamp x0: images may diverge; "
            "sampler.spacing=leading starts later", solver, spacing, levels[0],
        )
    return TimeGrid(
        scheduler.timesteps.double() * schedule.time_scale, levels[:-1], levels[1:], solver=solver,
        make_scheduler=make_scheduler,
    )


def _scheduler(solver: str, steps: int, **settings: Any) -> Any:
    """Return a fresh scheduler at its first step; a function of this module, so that grids can be pickled."""
    scheduler = _FACTORIES[solver](prediction_type="epsilon", **settings)
    scheduler.set_timesteps(steps)
    return scheduler


def _offset(schedule: NoiseSchedule, steps: int, solver: str) -> int:
    """Return the offset of `leading` times, lowered where the noisiest one would lie behind the schedule's end."""
    total = len(schedule)
    noisiest = total // (steps + 1) * steps if solver == "dpm_solver" else total // steps * (steps - 1)
    return min(schedule.steps_offset, total - 1 - noisiest)


def _levels(scheduler: Any) -> Tensor:
    """alpha_bar of each evaluation and of the final state, float64 [S + 1], as the scheduler has them."""
    from diffusers import PNDMScheduler

    if isinstance(scheduler, PNDMScheduler):
        levels = scheduler.alphas_cumprod[scheduler.timesteps]
        return torch.cat([levels, scheduler.final_alpha_cumprod.view(1)]).double()
    return 1 / (1 + scheduler.sigmas.double() ** 2)


def _check_times(scheduler: Any, solver: str, steps: int, spacing: str) -> None:
    """ConfigError unless the scheduler has `steps` decreasing times inside the schedule, and really goes by them."""
    total = scheduler.config.num_train_timesteps
    times = torch.unique_consecutive(scheduler.timesteps.double())
    inside = 0 <= float(times[-1]) and 0 < float(times[0]) <= total - 1
    if len(times) != steps or not bool((times.diff() < 0).all()) or not inside:
        raise ConfigError(
            f"sampler.steps={steps}: sampler={solver} has no {steps} different times with sampler.spacing={spacing}; "
            "choose another number of steps, or sampler.spacing=leading"
        )
    # this scheduler subtracts T // steps from each time, whatever the next one is
    stride = total // steps
    if solver == "pndm" and (bool((times.diff() != -stride).any()) or float(times[-1]) - stride >= 0):
        raise ConfigError(
            f"sampler.spacing={spacing}: sampler=pndm moves in strides of {total} // {steps} = {stride} and would miss "
            f"these times; choose leading with at most {total // 2} steps, or trailing with steps that divide {total}"
        )
