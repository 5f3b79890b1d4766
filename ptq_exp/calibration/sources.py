"""Where calibration states come from (PTQ4DM, section 3.3): denoising runs, diffused images, raw images, noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ptq_exp.diffusion.call import on_device, to_device
from ptq_exp.diffusion.guidance import Guided
from ptq_exp.diffusion.model import DiffusionModel
from ptq_exp.diffusion.noise import CALIBRATION, SampleNoise, sample_generator
from ptq_exp.diffusion.sampler import StepRecord, ddim_step
from ptq_exp.diffusion.time_grid import TimeGrid
from ptq_exp.errors import ConfigError, DataError

NO_IMAGES = (
    "calibration.source=raw and =diffuse need real images: set model.images.path to a folder of images, an .npz file "
    "(arr_0 uint8 [N, H, W, C]) or a folder of CIFAR-10's python files"
)


class ImageSource(Protocol):
    """Real images, uint8 [M, H, W, C], read when they are asked for: a numpy array is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class StateRequest:
    """Which states are wanted: sample `indices` [N] of `seed`, sample i as it enters step `steps[i]` of `grid`.

    `denoise` takes `len(grid)` for a step, too: the state behind the last one.

    `denoiser` (the model's own where None) makes the trajectories of `denoise`, guided if guidance is wanted; `images`
    are the real images that `diffuse` and `raw` start from.
    """

    grid: TimeGrid
    indices: Sequence[int]
    steps: Tensor
    seed: int
    denoiser: nn.Module | None = None
    images: ImageSource | None = None
    device: torch.device | str = "cpu"

    def noise(self, shape: Sequence[int]) -> SampleNoise:
        """Return the noise streams of these samples, apart from those of evaluation."""
        return SampleNoise(self.seed, self.indices, shape, stream=CALIBRATION)

    def drawn_states(self, model: DiffusionModel) -> Tensor:
        """One real image per sample, encoded where the model has a first stage: float32 [N, *model.sample_shape].

        Which one is chosen by (seed, index) alone.

        Raises:
            DataError: there are no images, or they do not fit the model.
        """
        if self.images is None:
            raise DataError(NO_IMAGES)
        chosen = chosen_images(len(self.images), self.indices, self.seed)
        images = torch.tensor(np.asarray(self.images[chosen])).permute(0, 3, 1, 2)
        return model.encode((images.float() / 127.5 - 1).to(self.device)).cpu().contiguous()


def chosen_images(n_images: int, indices: Sequence[int], seed: int) -> np.ndarray:
    """Which of the real images sample `indices` start from, int64 [N]; each chosen by (seed, index) alone."""
    generators = (sample_generator(seed, int(i), CALIBRATION + 1) for i in indices)
    return np.array([int(torch.randint(n_images, (), generator=generator)) for generator in generators])


@torch.no_grad()
def denoise(model: DiffusionModel, request: StateRequest) -> tuple[Tensor, Tensor]:
    """States of full-precision denoising runs from pure noise.

    A trajectory stops at its sample's step and leaves the batch, so that the cost is the sum of the steps needed. The
    solvers of diffusers keep the batch together, up to its last step.
    """
    grid, steps = request.grid, request.steps
    if grid.make_scheduler is not None:
        return _denoise_together(model, request)
    noise = request.noise(model.sample_shape)
    x = to_device(noise.draw(), request.device)
    denoiser = request.denoiser or model.denoiser
    given = on_device(model.draw_conditions(request.indices, request.seed, CALIBRATION), x.device)
    states = torch.empty(x.shape)
    active = torch.arange(len(x))
    for step in range(int(steps.max()) + 1):
        arrived = steps[active] == step
        if bool(arrived.any()):  # of a step without any, nothing is fetched from the device
            states[active[arrived]] = x[to_device(arrived.nonzero().flatten(), x.device)].cpu()
            staying = (~arrived).nonzero().flatten()
            noise.keep(staying.tolist())
            active, kept = active[staying], to_device(staying, x.device)
            x, given = x[kept], {name: value[kept] for name, value in given.items()}
        if len(active) == 0:
            break
        eps = denoiser(x, to_device(grid.network_time(step, len(x)), x.device), **given)
        z = to_device(noise.draw(), x.device) if grid.eta > 0 else None
        alphas = float(grid.alphas_cumprod[step]), float(grid.alphas_cumprod_prev[step])
        clipping = {"clip_sample": model.clip_sample, "rederive_eps": grid.rederive_eps}
        x = ddim_step(x, eps, *alphas, grid.eta, z, **clipping)[0]
    return states, steps * (2 if isinstance(denoiser, Guided) else 1)


def _denoise_together(model: DiffusionModel, request: StateRequest) -> tuple[Tensor, Tensor]:
    """`denoise` for schedulers that keep the estimates of their batch: no sample can leave, all pay for the last."""
    denoiser, steps = request.denoiser or model.denoiser, request.steps
    last = int(steps.max())
    states = torch.empty(len(steps), *model.sample_shape)

    def record(r: StepRecord) -> None:
        arrived = (steps == r.step).nonzero().flatten()
        if len(arrived):
            states[arrived] = r.x[to_device(arrived, r.x.device)].cpu()

    end = model.run(
        denoiser, request.grid, request.indices, request.seed, stream=CALIBRATION, device=request.device, steps=last,
        on_step=record,
    )
    states[steps == last] = end.cpu()[steps == last]
    return states, torch.full_like(steps, last * (2 if isinstance(denoiser, Guided) else 1))


def diffuse(model: DiffusionModel, request: StateRequest) -> tuple[Tensor, Tensor]:
    """Real images diffused to the noise level of their step, q(x_t | x_0) ("training-mimic")."""
    alpha_bar = request.grid.alphas_cumprod[request.steps].view(-1, 1, 1, 1).float()
    eps = request.noise(model.sample_shape).draw()
    return alpha_bar.sqrt() * request.drawn_states(model) + (1 - alpha_bar).sqrt() * eps, _free(request)


def raw(model: DiffusionModel, request: StateRequest) -> tuple[Tensor, Tensor]:
    """Real images as they are, whatever their step."""
    return request.drawn_states(model), _free(request)


def noise(model: DiffusionModel, request: StateRequest) -> tuple[Tensor, Tensor]:
    """Gaussian noise, whatever its step."""
    return request.noise(model.sample_shape).draw(), _free(request)


def _free(request: StateRequest) -> Tensor:
    return torch.zeros_like(request.steps)


SOURCES: dict[str, Callable[[DiffusionModel, StateRequest], tuple[Tensor, Tensor]]] = {
    "denoise": denoise,
    "diffuse": diffuse,
    "raw": raw,
    "noise": noise,
}
"""Each: (model, request) -> (states float32 [N, C, H, W] on the CPU, network evaluations spent on each, int64 [N]).

Add your own; `request.images` are there for it where the model has any.
"""
WITHOUT_IMAGES = ("denoise", "noise")
"""Sources that never ask for real images."""


def source(name: str) -> Callable[[DiffusionModel, StateRequest], tuple[Tensor, Tensor]]:
    """Return the source called `name`; ConfigError with the valid names otherwise."""
    if name not in SOURCES:
        raise ConfigError(f"calibration.source={name}: choose one of {', '.join(SOURCES)}")
    return SOURCES[name]
