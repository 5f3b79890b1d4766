"""Classifier-free guidance (Ho and Salimans 2022) as a wrapper: the guided denoiser is again a denoiser."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Guided(nn.Module):
    """eps = eps_uncond + guidance_scale (eps_cond - eps_uncond), both from one call of twice the batch.

    Args:
        denoiser: (x [N, C, H, W], t [N], y [N]) -> eps [N, C, H, W].
        guidance_scale: 1 = the conditional estimate alone, without a second half.
        null_label: the label that means "no class".
    """

    def __init__(self, denoiser: nn.Module, guidance_scale: float, null_label: int) -> None:
        super().__init__()
        self.denoiser, self.guidance_scale, self.null_label = denoiser, guidance_scale, null_label

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Guided eps [N, C, H, W]; `y` int64 [N]."""
        if self.guidance_scale == 1:
            return self.denoiser(x, t, y)
        uncond, cond = self.denoiser(*both_halves(x, t, y, self.null_label)).chunk(2)
        return uncond + self.guidance_scale * (cond - uncond)


def both_halves(x: Tensor, t: Tensor, y: Tensor, null_label: int) -> tuple[Tensor, Tensor, Tensor]:
    """The batch [2 N] that guidance evaluates: unconditional first, then conditional, as latent diffusion orders it."""
    return torch.cat([x, x]), torch.cat([t, t]), torch.cat([torch.full_like(y, null_label), y])
