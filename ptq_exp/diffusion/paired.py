"""Noise estimates of a full-precision denoiser and of quantized ones, step by step on the same states."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ptq_exp.diffusion.model import DiffusionModel
from ptq_exp.diffusion.noise import EVALUATION
from ptq_exp.diffusion.sampler import Denoiser, StepRecord
from ptq_exp.diffusion.time_grid import TimeGrid
from ptq_exp.errors import ConfigError

FOLLOW = ("fp32", "quantized")

OnPair = Callable[[int, Tensor, list[Tensor]], None]
"""(step, eps [N, C, H, W] of full precision, one eps_q of the same shape for each quantized denoiser)."""


@torch.no_grad()
def paired_estimates(
    model: DiffusionModel, denoiser: Denoiser, quantized: Sequence[Denoiser], grid: TimeGrid, indices: Sequence[int],
    seed: int, on_pair: OnPair, *, stream: int = EVALUATION, follow: str = "fp32", device: torch.device | str = "cpu",
) -> None:
    """Call `on_pair` at each step of the trajectories of sample `indices`, with all estimates of the same states.

    Args:
        denoiser: full precision, guided as the `quantized` ones are.
        stream: of noise and conditions; see `ptq_exp.diffusion.noise`.
        follow: whose trajectory gives the states: "fp32", so that errors do not accumulate over steps, or "quantized",
            the first of the quantized denoisers, where it really runs.

    Raises:
        ConfigError: `follow` is neither.
    """
    if follow not in FOLLOW:
        raise ConfigError(f"correction.follow={follow}: choose one of {', '.join(FOLLOW)}")

    def record(r: StepRecord) -> None:
        if follow == "fp32":
            own, others = r.eps, [r.call.evaluate(other) for other in quantized]
        else:
            own = r.call.evaluate(denoiser)
            others = [r.eps, *(r.call.evaluate(other) for other in quantized[1:])]
        own, *others = (model.by_image(estimate, len(indices)) for estimate in (own, *others))
        on_pair(r.step, own, others)

    model.run(
        denoiser if follow == "fp32" else quantized[0], grid, indices, seed, stream=stream, device=device,
        on_step=record,
    )


def relative_eps_error(
    model: DiffusionModel, denoiser: Denoiser, quantized: Denoiser, grid: TimeGrid, indices: Sequence[int],
    seed: int, *, device: torch.device | str = "cpu", on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """||eps_q - eps|| / ||eps|| for each step, float64 [S], over all `indices`, on the full-precision trajectories.

    `denoiser` (full precision) and `quantized` are guided alike. `on_step` is called after each step (a progress bar).
    """
    error = torch.zeros(len(grid), dtype=torch.float64)
    norm = torch.zeros_like(error)

    def add(step: int, eps: Tensor, estimates: list[Tensor]) -> None:
        error[step] += float((estimates[0] - eps).double().square().sum())
        norm[step] += float(eps.double().square().sum())
        on_step()

    paired_estimates(model, denoiser, [quantized], grid, indices, seed, add, device=device)
    return (error / norm).sqrt()
