"""What networks predict: the noise eps, v = alpha eps - sigma x0, or the image x0; all of it turned into eps.

A state is x = alpha x0 + sigma eps, with alpha = sqrt(alpha_bar) and sigma = sqrt(1 - alpha_bar) of its time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq_exp.diffusion.time_grid import NoiseSchedule
from ptq_exp.errors import ConfigError

PREDICTIONS = ("epsilon", "v_prediction", "sample")
"""As the schedulers of diffusers name them."""


class AsEps(nn.Module):
    """A network that predicts v or x0 as eps(x, t, **conditions).

    v (Salimans and Ho 2022, appendix D): eps = alpha v + sigma x. x0: eps = (x - alpha x0) / sigma. Between two times
    of the schedule sigma / alpha is interpolated linearly, as the Euler scheduler of diffusers does.

    Args:
        network: (x [N, C, H, W], t [N] network time, conditions by name) -> v or x0 [N, C, H, W].
        prediction: "v_prediction" or "sample" (x0).
        schedule: that the network was trained with.

    Raises:
        ConfigError: another prediction, or a time at which nothing of the image is left (alpha_bar = 0: eps is then
            the state itself and says nothing of the image) or nothing of the noise (alpha_bar = 1, for x0).
    """

    def __init__(self, network: nn.Module, prediction: str, schedule: NoiseSchedule) -> None:
        super().__init__()
        if prediction not in PREDICTIONS[1:]:
            raise ConfigError(f"prediction_type={prediction}: choose one of {', '.join(PREDICTIONS)}")
        levels = schedule.alphas_cumprod.double()
        if not bool(((levels > 0) & (levels < 1)).all()):
            raise ConfigError(
                f"prediction_type={prediction}: alpha_bar is {float(levels.min()):g} to {float(levels.max()):g}; it "
                "must lie between 0 and 1, both excluded, to be turned into a prediction of the noise"
            )
        self.network, self.prediction, self.time_scale = network, prediction, schedule.time_scale
        self.register_buffer("noise_to_signal", ((1 - levels) / levels).sqrt(), persistent=False)

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        """eps [N, C, H, W], of the type of `x`."""
        found = self.network(x, t, **conditions)
        alpha, sigma = (part.to(x.dtype).view(-1, *[1] * (x.ndim - 1)) for part in self._coefficients(t))
        if self.prediction == "v_prediction":
            return alpha * found + sigma * x
        return (x - alpha * found) / sigma

    def _coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) [N] at the network times `t` [N]."""
        ratios, position = self.noise_to_signal, t.to(self.noise_to_signal.dtype) / self.time_scale
        below = position.floor().clamp(0, len(ratios) - 1).long()
        above = (below + 1).clamp(max=len(ratios) - 1)
        ratio = torch.lerp(ratios[below], ratios[above], (position - below).clamp(0, 1))
        alpha = (1 + ratio**2).rsqrt()
        return alpha, ratio * alpha


def as_eps(network: nn.Module, prediction: str, schedule: NoiseSchedule) -> nn.Module:
    """`network` as eps(x, t, **conditions): itself where it predicts the noise, else inside `AsEps`."""
    return network if prediction == "epsilon" else AsEps(network, prediction, schedule)
