"""How far a quantized denoiser is from its full-precision twin, step by step on the same states."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ptq_exp.diffusion.model import DiffusionModel
from ptq_exp.diffusion.sampler import StepRecord
from ptq_exp.diffusion.time_grid import TimeGrid


@torch.no_grad()
def relative_eps_error(
    model: DiffusionModel, denoiser: nn.Module, quantized: nn.Module, grid: TimeGrid, indices: Sequence[int],
    seed: int, *, device: torch.device | str = "cpu", on_step: Callable[[], object] = lambda: None,
) -> Tensor:  # fmt: skip
    """||eps_q - eps|| / ||eps|| for each step, float64 [S], over all `indices`, on the full-precision trajectories.

    `denoiser` (full precision) and `quantized` are guided alike, and both see the state of the full-precision run, so
    that errors do not accumulate over steps. `on_step` is called after each step (a progress bar).
    """
    error = torch.zeros(len(grid), dtype=torch.float64)
    norm = torch.zeros_like(error)
    y = model.labels(indices, seed)
    y = None if y is None else y.to(device)

    def record(r: StepRecord) -> None:
        eps_q = quantized(r.x, grid.network_time(r.step, len(r.x)).to(r.x.device), y)
        error[r.step] += float((eps_q - r.eps).double().square().sum())
        norm[r.step] += float(r.eps.double().square().sum())
        on_step()

    model.run(denoiser, grid, indices, seed, device=device, on_step=record)
    return (error / norm).sqrt()
