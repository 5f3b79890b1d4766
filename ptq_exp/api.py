"""Sampling in one call, for scripts and notebooks."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ptq_exp.deploy.draw import draw
from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.diffusion import DiffusionModel, check_network
from ptq_exp.errors import ConfigError, DataError


def sample(
    model: DiffusionModel | QuantizedModel, n: int, seed: int = 0, *,
    steps: int | None = None, spacing: str | None = None, eta: float | None = None, guidance_scale: float | None = None,
    denoiser: nn.Module | None = None, batch_size: int = 8, device: torch.device | str = "cpu", progress: bool = False,
) -> np.ndarray:
    """Draw images 0..n-1 of `seed`, uint8 [n, H, W, C]; the published sampler where nothing else is said.

    Image i depends on (seed, i) and the sampler alone: batches are padded to `batch_size`. Class-conditional models
    draw every class equally often (`DiffusionModel.labels`).

    Args:
        model: see `load_model`; or `load_quantized`, whose sampler settings are those that it was made for.
        steps, spacing, eta: see `DiffusionModel.time_grid`.
        guidance_scale: classifier-free guidance, 1 = none.
        denoiser: a quantized network in place of the model's own.
        batch_size: images per network evaluation (twice as many with guidance).
        device: where to compute; the model is moved there.
        progress: show a progress bar.

    Raises:
        ConfigError: a sampler setting does not fit the model, or is given for a saved quantized one.
        DataError: the images hold NaN or infinity (CheckpointError, ConfigError: the network gives them at once).
    """
    how = {"batch_size": batch_size, "device": device, "progress": progress}
    if isinstance(model, QuantizedModel):
        given = {"steps": steps, "spacing": spacing, "eta": eta, "guidance_scale": guidance_scale, "denoiser": denoiser}
        _refuse([name for name, value in given.items() if value is not None])
        return model.sample(n, seed, **how)
    grid = model.time_grid(steps, spacing, eta=eta)
    scale = model.sampler.guidance_scale if guidance_scale is None else guidance_scale
    try:
        return draw(model, model.guided(denoiser or model.denoiser, scale), grid, n, seed, **how)
    except DataError:
        if denoiser is None:
            check_network(model, grid, seed, device)  # says more, where the network alone is the reason
        raise


def _refuse(given: list[str]) -> None:
    if given:
        raise ConfigError(
            f"{given[0]}: a saved quantized model is sampled as it was made; for other settings, without its schedule "
            "and correction, call sample(quantized.model, n, denoiser=quantized.network, ...)"
        )
