"""Where calibration states come from (PTQ4DM, section 3.3): denoising runs, diffused images, raw images, noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq_exp.diffusion.model import DiffusionModel
from ptq_exp.diffusion.noise import CALIBRATION, SampleNoise, sample_generator
from ptq_exp.diffusion.sampler import ddim_step
from ptq_exp.diffusion.time_grid import TimeGrid
from ptq_exp.errors import ConfigError, DataError


@dataclass(frozen=True)
class StateRequest:
    """Which states are wanted: sample `indices` [N] of `seed`, sample i as it enters step `steps[i]` of `grid`.

    `images` float [M, C, H, W] in [-1, 1] are the real images that `diffuse` and `raw` start from.
    """

    grid: TimeGrid
    indices: Sequence[int]
    steps: Tensor
    seed: int
    eta: float = 0.0
    images: Tensor | None = None
    device: torch.device | str = "cpu"

    def noise(self, shape: Sequence[int]) -> SampleNoise:
        """The noise streams of these samples, apart from those of evaluation."""
        return SampleNoise(self.seed, self.indices, shape, stream=CALIBRATION)

    def drawn_images(self) -> Tensor:
        """One real image per sample, [N, C, H, W], chosen by (seed, index) alone."""
        if self.images is None:
            raise DataError("calibration.source=raw and =diffuse need real images, and this model comes with none")
        chosen = [
            int(torch.randint(len(self.images), (), generator=sample_generator(self.seed, int(i), CALIBRATION + 1)))
            for i in self.indices
        ]
        return self.images[chosen]


@torch.no_grad()
def denoise(model: DiffusionModel, request: StateRequest) -> tuple[Tensor, int]:
    """States of full-precision denoising runs from pure noise.

    A trajectory stops at its sample's step and leaves the batch, so that the cost is the sum of the steps needed.
    """
    grid, steps = request.grid, request.steps
    noise = request.noise(model.sample_shape)
    x = noise.draw()
    states = torch.empty_like(x)
    active = torch.arange(len(x))
    evaluations = 0
    for step in range(int(steps.max()) + 1):
        arrived = steps[active] == step
        states[active[arrived]] = x[arrived]
        x, active = x[~arrived], active[~arrived]
        noise.keep(torch.nonzero(~arrived).flatten().tolist())
        if len(active) == 0:
            break
        x = x.to(request.device)
        eps = model.denoiser(x, grid.network_time(step, len(x)).to(x.device))
        z = noise.draw().to(x.device) if request.eta > 0 else None
        alphas = float(grid.alphas_cumprod[step]), float(grid.alphas_cumprod_prev[step])
        x = ddim_step(x, eps, *alphas, request.eta, z, clip_sample=model.clip_sample)[0].cpu()
        evaluations += len(active)
    return states, evaluations


def diffuse(model: DiffusionModel, request: StateRequest) -> tuple[Tensor, int]:
    """Real images diffused to the noise level of their step, q(x_t | x_0) ("training-mimic")."""
    alpha_bar = request.grid.alphas_cumprod[request.steps].view(-1, 1, 1, 1).float()
    eps = request.noise(model.sample_shape).draw()
    return alpha_bar.sqrt() * request.drawn_images() + (1 - alpha_bar).sqrt() * eps, 0


def raw(model: DiffusionModel, request: StateRequest) -> tuple[Tensor, int]:
    """Real images as they are, whatever their step."""
    return request.drawn_images(), 0


def noise(model: DiffusionModel, request: StateRequest) -> tuple[Tensor, int]:
    """Gaussian noise, whatever its step."""
    return request.noise(model.sample_shape).draw(), 0


SOURCES: dict[str, Callable[[DiffusionModel, StateRequest], tuple[Tensor, int]]] = {
    "denoise": denoise,
    "diffuse": diffuse,
    "raw": raw,
    "noise": noise,
}
"""Each: (model, request) -> (states float32 [N, C, H, W] on the CPU, network evaluations spent)."""


def source(name: str) -> Callable[[DiffusionModel, StateRequest], tuple[Tensor, int]]:
    """The source called `name`; ConfigError with the valid names otherwise."""
    if name not in SOURCES:
        raise ConfigError(f"calibration.source={name}: choose one of {', '.join(SOURCES)}")
    return SOURCES[name]
