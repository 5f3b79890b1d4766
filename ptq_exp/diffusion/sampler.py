"""DDIM(eta) sampling over a `TimeGrid` (Song, Meng and Ermon 2021)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ptq_exp.diffusion.noise import SampleNoise
from ptq_exp.diffusion.time_grid import TimeGrid

Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class StepRecord(NamedTuple):
    """What `on_step` sees: the position in the grid, the state that entered it, the estimates, the state after it."""

    step: int
    x: Tensor
    eps: Tensor
    x0: Tensor
    x_prev: Tensor


def ddim_step(
    x: Tensor, eps: Tensor, alpha_bar: float, alpha_bar_prev: float, eta: float = 0.0,
    noise: Tensor | None = None, *, clip_sample: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One DDIM step from noise level `alpha_bar` to `alpha_bar_prev`.

    Symbols of Song et al. 2021, eq. 12 and 16: `x` is x_t, `eps` is epsilon_theta(x_t, t), `alpha_bar` their alpha_t,
    sigma = eta sqrt((1 - alpha_bar_prev) / (1 - alpha_bar)) sqrt(1 - alpha_bar / alpha_bar_prev). With `clip_sample`
    the predicted x0 is clamped to [-1, 1] and eps derived from it again, as ADM and improved-diffusion do.

    Returns:
        (x_prev, x0), both of the shape of `x`.
    """
    x0 = (x - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5
    if clip_sample:
        x0 = x0.clamp(-1.0, 1.0)
        eps = (x - alpha_bar**0.5 * x0) / (1 - alpha_bar) ** 0.5
    sigma = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)) ** 0.5
    # for eta = 1 rounding can leave -1e-17, whose root would be complex
    direction = max(1 - alpha_bar_prev - sigma**2, 0.0) ** 0.5
    x_prev = alpha_bar_prev**0.5 * x0 + direction * eps
    if sigma > 0:
        x_prev = x_prev + sigma * noise
    return x_prev, x0


@torch.no_grad()
def sample(
    denoiser: Denoiser, grid: TimeGrid, noise: SampleNoise, *, y: Tensor | None = None, clip_sample: bool = False,
    device: torch.device | str = "cpu", steps: int | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
) -> Tensor:  # fmt: skip
    """Run `denoiser` from pure noise through the first `steps` steps of `grid` (all by default).

    Args:
        denoiser: (x [N, C, H, W], t [N] network time, y [N] labels or None) -> eps [N, C, H, W].
        noise: one stream per sample; its first draw is the initial state.
        on_step: called after each step with a `StepRecord`; how states and estimates are recorded.

    Returns:
        The state after the last step [N, C, H, W] on `device`.
    """
    x = noise.draw().to(device)
    for step in range(len(grid) if steps is None else steps):
        eps = denoiser(x, grid.network_time(step, len(x)).to(device), y)
        z = noise.draw().to(device) if grid.eta > 0 else None
        x_prev, x0 = ddim_step(
            x, eps, float(grid.alphas_cumprod[step]), float(grid.alphas_cumprod_prev[step]), grid.eta, z,
            clip_sample=clip_sample,
        )  # fmt: skip
        if on_step is not None:
            on_step(StepRecord(step, x, eps, x0, x_prev))
        x = x_prev
    return x


def padded_batches(n: int, batch_size: int) -> list[range]:
    """Sample indices 0..n-1 in batches of exactly `batch_size`; the last one runs past n and is cut by the caller.

    A constant batch shape makes image i bitwise independent of how many images are asked for.
    """
    return [range(start, start + batch_size) for start in range(0, n, batch_size)]
