"""`DiffusionModel`: a denoiser with its time convention, image shape and identity."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq_exp.diffusion.noise import SampleNoise
from ptq_exp.diffusion.sampler import sample
from ptq_exp.diffusion.time_grid import TimeGrid


class UNetDenoiser(nn.Module):
    """A `diffusers` U-Net as a function eps(x, t, y): unwraps the output and drops learned-variance channels.

    x float [N, C, H, W], t float [N] network time, y unused by an unconditional U-Net -> eps [N, C, H, W].
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.unet(x, t).sample[:, : x.shape[1]]


@dataclass
class DiffusionModel:
    """A trained diffusion model.

    Attributes:
        name: what tables call it.
        denoiser: eps(x, t, y), float [N, C, H, W] -> the same shape.
        alphas_cumprod: the training schedule, float64 [T].
        sample_shape: (C, H, W) of a state.
        clip_sample: clamp the predicted x0 to [-1, 1] while sampling (pixel models).
        digest: hash of the weights; artefacts made with the model are keyed by it.
    """

    name: str
    denoiser: nn.Module
    alphas_cumprod: Tensor
    sample_shape: tuple[int, int, int]
    clip_sample: bool
    digest: str

    def time_grid(self, steps: int, spacing: str = "leading") -> TimeGrid:
        """The grid of `steps` sampling steps; see `TimeGrid.from_alphas_cumprod`."""
        return TimeGrid.from_alphas_cumprod(self.alphas_cumprod, steps, spacing)

    def twin(self) -> nn.Module:
        """An independent copy of the denoiser, to be quantized while the original stays full precision."""
        return copy.deepcopy(self.denoiser)

    def example_inputs(self) -> tuple[Tensor, Tensor]:
        """(x [1, C, H, W], t [1]) for shape tracing."""
        return torch.zeros(1, *self.sample_shape), torch.zeros(1)

    def sample(
        self, denoiser: nn.Module, grid: TimeGrid, indices, seed: int, *, eta: float = 0.0, device="cpu", **kwargs
    ) -> Tensor:
        """Images [N, C, H, W] float of sample `indices` of `seed`, drawn with `denoiser` (FP or quantized twin)."""
        noise = SampleNoise(seed, indices, self.sample_shape)
        return sample(denoiser, grid, noise, eta=eta, clip_sample=self.clip_sample, device=device, **kwargs)
