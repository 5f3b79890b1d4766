"""Corrections that are fitted on the trajectory that they produce, step after step, towards the full-precision states.

PTQD fits each step on full-precision states and takes the errors of different steps for independent. They are not: an
error that is the same in all steps adds up along the trajectory, and a correction that lowers the error of every single
estimate can move the final state further away. Here step s is fitted on the states that the quantized model reaches
with the corrections of the steps before it, so that what is left of their errors is corrected, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ptq_exp.correction.gain_and_offset import Line, Seen, fit_line, statistics_of
from ptq_exp.correction.statistics import NoiseStatistics
from ptq_exp.diffusion import Call, DiffusionModel, SampleNoise, TimeGrid, ddim_step
from ptq_exp.diffusion.call import on_device
from ptq_exp.diffusion.noise import CALIBRATION
from ptq_exp.diffusion.sampler import Denoiser
from ptq_exp.errors import ConfigError, DataError


@dataclass
class _Batch:
    """Trajectories side by side: full precision and quantized, of the same noise and conditions."""

    noise: SampleNoise
    conditions: dict[str, Tensor]
    reference: Tensor
    state: Tensor
    seen: Seen | None = field(default=None)


@torch.no_grad()
def fit_on_trajectory(
    model: DiffusionModel, denoiser: Denoiser, quantized: Denoiser, grid: TimeGrid, indices: Sequence[int], seed: int,
    *, correlation: bool = False, bias: bool = True, shrink: bool = True, batch_size: int = 64,
    device: torch.device | str = "cpu", on_step: Callable[[], object] = lambda: None,
) -> NoiseStatistics:
    """Fit a slope and a bias per channel to each step, on the states that the steps before it led to.

    In step s the corrected estimate eps' = gain eps_q + offset minimises the mean squared distance between the next
    state of the quantized model and that of full precision with the same noise; gain = 1 / (1 + k) and
    offset = -bias / (1 + k). Clamped elements, whose next state does not follow eps, have no part in it.

    Args:
        model: whose samples `indices` of `seed` are followed, in the stream of calibration.
        denoiser: full precision, guided as `quantized` is.
        correlation, bias: whether a slope and a bias are fitted; without, they are 0.
        shrink: pull both towards 0 as far as the scatter between samples leaves them unsure.
        on_step: called after each batch of each step (a progress bar).

    Returns:
        Statistics for `Corrected`, those of the errors that the fit saw.

    Raises:
        ConfigError: the grid is walked by a scheduler of diffusers, whose steps are not ours.
        DataError: a state or an estimate is not finite.
    """
    check_grid(grid)
    batches = [
        _started(model, indices[first : first + batch_size], seed, device)
        for first in range(0, len(indices), batch_size)
    ]
    lines: list[Line] = []
    for step, repeated in enumerate(grid.first_with_time.tolist()):
        for batch in batches:
            batch.seen = _seen(batch, denoiser, quantized, grid, step, model.clip_sample, device)
            on_step()
        line = lines[repeated] if repeated < step else fit_line(
            [batch.seen for batch in batches], correlation=correlation, bias=bias, shrink=shrink
        )
        lines.append(line)
        for batch in batches:
            batch.state, batch.reference, batch.seen = batch.seen.next_state(line), batch.seen.wanted, None
    return statistics_of(lines, len(indices))


@torch.no_grad()
def final_error_db(
    model: DiffusionModel, denoisers: Sequence[Denoiser], grid: TimeGrid, indices: Sequence[int], seed: int, *,
    batch_size: int = 64, device: torch.device | str = "cpu", on_batch: Callable[[], object] = lambda: None,
) -> Tensor:
    """Measure how far each image is from that of the first of `denoisers`: the mean squared error in dB.

    Latents are decoded: nearer ones need not be nearer images.

    Returns:
        Float64 [D - 1, N]: 10 log10 of the error of each other denoiser; a difference of it is one of PSNR.
    """
    found = []
    for first in range(0, len(indices), batch_size):
        own = indices[first : first + batch_size]
        states = (model.run(denoiser, grid, own, seed, stream=CALIBRATION, device=device) for denoiser in denoisers)
        reference, *others = (model.decode(state).clamp(-1, 1).double() for state in states)
        errors = [(other - reference).square().flatten(1).mean(1) for other in others]
        # equal images have no logarithm; this is far below a level of an 8-bit image
        found.append(10 * torch.log10(torch.stack(errors).clamp(min=1e-12)).cpu())
        on_batch()
    return torch.cat(found, 1)


def nearest(errors: Tensor) -> int:
    """Choose the row of `errors` [D, N] that is surely lower than row 0, by most; 0 if none is.

    Surely: the mean of the paired differences is more than two standard errors below 0.
    """
    change = errors - errors[:1]
    mean, n = change.mean(1), errors.shape[1]
    stderr = change.std(1) / n**0.5 if n > 1 else torch.full_like(mean, torch.inf)
    mean = torch.where(mean < -2 * stderr, mean, torch.inf)
    mean[0] = 0.0
    return int(mean.argmin())


def check_grid(grid: TimeGrid) -> None:
    """Raise ConfigError for a grid that a scheduler of diffusers walks."""
    if grid.make_scheduler is not None:
        raise ConfigError(
            f"correction.fit=trajectory follows the steps of sampler=ddim, and sampler={grid.solver} makes others: set "
            "correction.fit=estimates"
        )


def _started(model: DiffusionModel, indices: Sequence[int], seed: int, device: torch.device | str) -> _Batch:
    noise = SampleNoise(seed, indices, model.sample_shape, CALIBRATION)
    x = noise.draw().to(device)
    return _Batch(noise, on_device(model.draw_conditions(indices, seed, CALIBRATION), device), x, x)


def _seen(
    batch: _Batch, denoiser: Denoiser, quantized: Denoiser, grid: TimeGrid, step: int, clip_sample: bool,
    device: torch.device | str,
) -> Seen:
    """Evaluate both denoisers on their own states."""
    t = grid.network_time(step, len(batch.state)).to(device)
    eps = Call(batch.reference, t, batch.conditions).evaluate(denoiser)
    eps_q = Call(batch.state, t, batch.conditions).evaluate(quantized)
    if not bool(eps.isfinite().all() and eps_q.isfinite().all()):
        raise DataError(f"step {step}: a noise estimate holds NaN or infinity: no correction can be fitted")
    z = batch.noise.draw().to(device) if grid.eta > 0 else None
    level, previous = float(grid.alphas_cumprod[step]), float(grid.alphas_cumprod_prev[step])
    wanted, _ = ddim_step(
        batch.reference, eps, level, previous, grid.eta, z, clip_sample=clip_sample, rederive_eps=grid.rederive_eps
    )
    return Seen(
        batch.state, eps_q, wanted, z, level, previous, grid.eta, clip_sample=clip_sample,
        rederive_eps=grid.rederive_eps,
    )
