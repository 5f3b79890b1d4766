"""Classifier-free guidance (Ho and Salimans 2022) as a wrapper: the guided denoiser is again a denoiser."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ptq_exp.diffusion.call import Call


class Guided(nn.Module):
    """eps = eps_uncond + guidance_scale (eps_cond - eps_uncond), both from one call of twice the batch.

    Args:
        denoiser: (x [N, C, H, W], t [N], conditions [N, ...] by name) -> eps [N, C, H, W].
        guidance_scale: 1 = the conditional estimate alone, without a second half.
        unconditional: {name: what a sample without that condition has, a number or a tensor [...]}.
    """

    def __init__(
        self, denoiser: nn.Module, guidance_scale: float, unconditional: Mapping[str, float | Tensor]
    ) -> None:
        super().__init__()
        self.denoiser, self.guidance_scale, self.unconditional = denoiser, guidance_scale, dict(unconditional)

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        """Guided eps [N, C, H, W]."""
        call = Call(x, t, conditions)
        if self.guidance_scale == 1:
            return call.evaluate(self.denoiser)
        uncond, cond = both_halves(call, self.unconditional).evaluate(self.denoiser).chunk(2)
        return uncond + self.guidance_scale * (cond - uncond)


def both_halves(call: Call, unconditional: Mapping[str, float | Tensor]) -> Call:
    """Return the batch [2 N] that guidance evaluates: unconditional, then conditional, as latent diffusion has it.

    Conditions without an entry in `unconditional` are the same in both halves.
    """
    conditions = {
        name: torch.cat([torch.as_tensor(unconditional.get(name, value)).to(value).expand_as(value), value])
        for name, value in call.conditions.items()
    }
    return Call(torch.cat([call.x, call.x]), torch.cat([call.t, call.t]), conditions)
