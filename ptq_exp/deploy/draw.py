"""Images of a model in one call, for scripts and notebooks; experiments stream theirs to disk instead."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ptq_exp.diffusion import DiffusionModel, TimeGrid, padded_batches
from ptq_exp.evaluation.images import to_uint8


def draw(
    model: DiffusionModel, denoiser: nn.Module, grid: TimeGrid, n: int, seed: int, *, batch_size: int,
    device: torch.device | str, progress: bool, **noise_in_eps: Any,
) -> np.ndarray:
    """Draw images 0..n-1 of `seed` with a guided `denoiser`, uint8 [n, H, W, C].

    Batches are padded to `batch_size`: image i depends on (seed, i) alone.

    Args:
        noise_in_eps: see `ptq_exp.diffusion.sample`.

    Raises:
        DataError: the images hold NaN or infinity.
    """
    denoiser.to(device)
    if model.first_stage is not None:
        model.first_stage.to(device)
    batches = tqdm(padded_batches(n, batch_size), desc=f"{model.name} images", disable=not progress, mininterval=0.5)
    images = [to_uint8(model.sample(denoiser, grid, batch, seed, device=device, **noise_in_eps)) for batch in batches]
    return np.concatenate(images)[:n]
