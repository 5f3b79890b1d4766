"""DDIM(eta) sampling over a `TimeGrid` (Song, Meng and Ermon 2021), and grids that a scheduler of diffusers walks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ptq_exp.diffusion.call import Call, to_device
from ptq_exp.diffusion.noise import SampleNoise
from ptq_exp.diffusion.time_grid import TimeGrid
from ptq_exp.errors import ConfigError

Denoiser = Callable[..., Tensor]
"""(x [N, C, H, W], t [N] network time, conditions [N, ...] by name) -> eps [N, C, H, W]."""
CONVENTIONS = ("exact", "code")


class StepRecord(NamedTuple):
    """What `on_step` sees: the position in the grid, what the network received, its estimates, the state afterwards.

    States are those that the network receives, sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps, whatever the scale that a
    solver keeps its own states in. Models that are not sampled here say neither `x0` nor `x_prev`.
    """

    step: int
    call: Call
    eps: Tensor
    x0: Tensor | None = None
    x_prev: Tensor | None = None

    @property
    def x(self) -> Tensor:
        """The state that entered the step."""
        return self.call.x


class StepCoefficients(NamedTuple):
    """Of one DDIM step, x_prev = sqrt(alpha_bar_prev / alpha_bar) x + `eps` eps + `sigma` z.

    `direction` is the coefficient of eps beside x0, x_prev = sqrt(alpha_bar_prev) x0 + `direction` eps + `sigma` z.
    """

    sigma: float
    direction: float
    eps: float


def step_coefficients(alpha_bar: float, alpha_bar_prev: float, eta: float) -> StepCoefficients:
    """Coefficients of the step from noise level `alpha_bar` to `alpha_bar_prev` (Song et al. 2021, eq. 12 and 16).

    sigma = eta sqrt((1 - alpha_bar_prev) / (1 - alpha_bar)) sqrt(1 - alpha_bar / alpha_bar_prev),
    direction = sqrt(1 - alpha_bar_prev - sigma^2),
    eps = direction - sqrt(alpha_bar_prev (1 - alpha_bar) / alpha_bar). Levels may be tensors of one shape: so are the
    coefficients then.
    """
    sigma = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)) ** 0.5
    direction = _positive(1 - alpha_bar_prev - sigma**2) ** 0.5
    return StepCoefficients(sigma, direction, direction - (alpha_bar_prev * (1 - alpha_bar) / alpha_bar) ** 0.5)


def _positive(value: float | Tensor) -> float | Tensor:
    """`value`, or 0 where rounding left -1e-17 (eta = 1), whose root would be complex."""
    return value.clamp(min=0.0) if isinstance(value, Tensor) else max(value, 0.0)


def ddim_step(
    x: Tensor, eps: Tensor, alpha_bar: float, alpha_bar_prev: float, eta: float = 0.0, noise: Tensor | None = None,
    eps_noise_std: float = 0.0, convention: str = "exact", *, clip_sample: bool = False, rederive_eps: bool = True,
) -> tuple[Tensor, Tensor]:
    """One DDIM step from noise level `alpha_bar` to `alpha_bar_prev`.

    `x` is x_t, `eps` is epsilon_theta(x_t, t), `noise` z ~ N(0, 1) where eta > 0; the formulas are those of
    `step_coefficients`. With `clip_sample` the predicted x0 is clamped to [-1, 1] and eps derived from it again, as ADM
    and improved-diffusion do; without `rederive_eps` it stays as it is, as in the DDIM of diffusers.

    Quantization leaves noise in eps, of standard deviation q = `eps_noise_std` once its mean is corrected. It reaches
    x_prev through c, the coefficient of eps, and takes the place of a part of the step's own noise (PTQD, section 4.2):

    Args:
        eps_noise_std: q >= 0.
        convention: "exact": sigma'^2 = max(0, sigma^2 - c^2 q^2), all else unchanged, so that mean and variance of the
            full-precision step are met exactly wherever c^2 q^2 <= sigma^2. Elements whose x0 was clamped carry no
            noise from eps: they keep sigma, or, without `rederive_eps`, carry it with `direction` in place of c.
            "code", as published: the direction term becomes sqrt(1 - alpha_bar_prev - sigma'^2) too, which moves the
            mean and leaves the variance short.

    Returns:
        (x_prev, x0), both of the shape of `x`.

    Raises:
        ConfigError: an unknown convention, or q is negative or not finite.
    """
    if convention not in CONVENTIONS:
        raise ConfigError(f"convention={convention}: choose one of {', '.join(CONVENTIONS)}")
    if not 0 <= eps_noise_std < float("inf"):
        raise ConfigError(f"eps_noise_std={eps_noise_std}: a standard deviation is a finite number of 0 or more")
    x0 = (x - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5
    clamped = None
    if clip_sample:
        clamped = x0.abs() > 1 if eps_noise_std > 0 else None
        x0 = x0.clamp(-1.0, 1.0)
        if rederive_eps:
            eps = (x - alpha_bar**0.5 * x0) / (1 - alpha_bar) ** 0.5
    sigma, direction, c = step_coefficients(alpha_bar, alpha_bar_prev, eta)
    own = sigma
    # not by way of the formula where q = 0: the root of the square can differ in the last bit
    if eps_noise_std > 0:
        own = max(sigma**2 - (c * eps_noise_std) ** 2, 0.0) ** 0.5
        if convention == "code":
            direction = _positive(1 - alpha_bar_prev - own**2) ** 0.5
        elif clamped is not None:
            left = sigma if rederive_eps else max(sigma**2 - (direction * eps_noise_std) ** 2, 0.0) ** 0.5
            own = torch.full_like(x, own).masked_fill_(clamped, left)
    x_prev = alpha_bar_prev**0.5 * x0 + direction * eps
    if sigma > 0:
        x_prev = x_prev + own * noise
    return x_prev, x0


@torch.no_grad()
def sample(
    denoiser: Denoiser, grid: TimeGrid, noise: SampleNoise, *, conditions: Mapping[str, Tensor] | None = None,
    clip_sample: bool = False, device: torch.device | str = "cpu", steps: int | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    eps_noise_std: Tensor | None = None, convention: str = "exact",
) -> Tensor:
    """Run `denoiser` from pure noise through the first `steps` steps of `grid` (all by default).

    Args:
        denoiser: (x [N, C, H, W], t [N] network time, conditions by name) -> eps [N, C, H, W].
        noise: one stream per sample; its first draw is the initial state.
        conditions: {argument name: tensor [N, ...] on `device`}; None = none.
        clip_sample: clamp the predicted x0 to [-1, 1]. The solvers of diffusers do not: there only the x0 that
            `on_step` sees is clamped.
        on_step: called after each step with a `StepRecord`; how states and estimates are recorded.
        eps_noise_std, convention: float [S], noise in the estimates of each step; None = none. See `ddim_step`.

    Returns:
        The state after the last step [N, C, H, W] on `device`.

    Raises:
        ConfigError: `eps_noise_std` is not one number per step, or the grid is walked by a solver, whose steps add no
            noise that could make room for it.
    """
    x, given = to_device(noise.draw(), device), conditions or {}
    steps = len(grid) if steps is None else steps
    if grid.make_scheduler is not None:
        if eps_noise_std is not None:
            raise ConfigError(
                f"sampler={grid.solver} adds no noise of its own that the noise in eps could take the place of: leave "
                "eps_noise_std out (correct the mean alone), or choose sampler=ddim with eta > 0"
            )
        return _solve(denoiser, grid, x, given, clip_sample, steps, on_step)
    if eps_noise_std is not None and len(eps_noise_std) != len(grid):
        raise ConfigError(f"eps_noise_std has {len(eps_noise_std)} values, but the grid has {len(grid)} steps")
    stds = [0.0] * len(grid) if eps_noise_std is None else eps_noise_std.tolist()
    # numbers, not tensors: no step waits for the device
    levels = list(zip(grid.alphas_cumprod.tolist(), grid.alphas_cumprod_prev.tolist(), stds, strict=True))
    for step in range(steps):
        call = Call(x, to_device(grid.network_time(step, len(x)), device), given)
        eps = call.evaluate(denoiser)
        z = to_device(noise.draw(), device) if grid.eta > 0 else None
        level, previous, std = levels[step]
        x_prev, x0 = ddim_step(
            x, eps, level, previous, grid.eta, z, std, convention, clip_sample=clip_sample,
            rederive_eps=grid.rederive_eps,
        )
        if on_step is not None:
            on_step(StepRecord(step, call, eps, x0, x_prev))
        x = x_prev
    return x


def _solve(
    denoiser: Denoiser, grid: TimeGrid, noise: Tensor, conditions: Mapping[str, Tensor], clip_sample: bool, steps: int,
    on_step: Callable[[StepRecord], None] | None,
) -> Tensor:
    """Run the first `steps` evaluations of a scheduler of diffusers, see `sample`; its state may have another scale."""
    # a multistep scheduler keeps the estimates of its batch: a used one would carry those of another
    scheduler = grid.make_scheduler()
    times = scheduler.timesteps
    state = noise * float(scheduler.init_noise_sigma)
    x = scheduler.scale_model_input(state, times[0])
    for step in range(steps):
        call = Call(x, to_device(grid.network_time(step, len(x)), x.device), conditions)
        eps = call.evaluate(denoiser)
        state = scheduler.step(eps, times[step], state).prev_sample
        x_prev = scheduler.scale_model_input(state, times[step + 1]) if step + 1 < len(grid) else state
        if on_step is not None:
            level = float(grid.alphas_cumprod[step])
            x0 = (x - (1 - level) ** 0.5 * eps) / level**0.5
            on_step(StepRecord(step, call, eps, x0.clamp(-1.0, 1.0) if clip_sample else x0, x_prev))
        x = x_prev
    return x


def padded_batches(n: int, batch_size: int) -> list[range]:
    """Sample indices 0..n-1 in batches of exactly `batch_size`; the last one runs past n and is cut by the caller.

    A constant batch shape makes image i bitwise independent of how many images are asked for.
    """
    return [range(start, start + batch_size) for start in range(0, n, batch_size)]
