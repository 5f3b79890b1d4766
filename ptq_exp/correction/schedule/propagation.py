"""How an error of the noise estimate in one sampling step arrives in the final state."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ptq_exp.diffusion import DiffusionModel, StepRecord, TimeGrid
from ptq_exp.diffusion.noise import CALIBRATION
from ptq_exp.diffusion.sampler import Denoiser
from ptq_exp.errors import DataError


@torch.no_grad()
def propagated(
    model: DiffusionModel, denoiser: Denoiser, quantized: Denoiser, grid: TimeGrid, steps: Sequence[int],
    indices: Sequence[int], seed: int, *, device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Let the quantized denoiser make the estimate of a single step, and the full-precision one all others.

    Measured on calibration trajectories, for each of `steps`. With the same noise, whatever the final states differ by
    comes from that step's error; how the network answers to it later is included.

    Returns:
        (cause, effect), float64 [N, len(steps)]: mean over elements of (eps_q - eps)^2 in the step, and of the squared
        difference of the final states.
    """

    def run(estimates: Denoiser, on_record: Callable[[StepRecord], None] | None = None) -> Tensor:
        return model.run(estimates, grid, indices, seed, stream=CALIBRATION, device=device, on_step=on_record)

    records: list[Tensor] = []
    wrong: dict[int, Tensor] = {}

    def record(r: StepRecord) -> None:
        records.append(r.eps)
        if r.step in steps:
            wrong[r.step] = r.call.evaluate(quantized)

    final = run(denoiser, record)
    cause, effect = [], []
    for step in steps:
        changed = run(_Replayed(denoiser, [*records[:step], wrong[step]]))
        cause.append((wrong[step] - records[step]).double().square().flatten(1).mean(1).cpu())
        effect.append((changed - final).double().square().flatten(1).mean(1).cpu())
    return torch.stack(cause, 1), torch.stack(effect, 1)


def gains(cause: Tensor, effect: Tensor, steps: Sequence[int], n_steps: int) -> Tensor:
    """Squared error of the final state per squared error of eps, for every step of the grid, float64 [n_steps].

    That of a typical sample: the geometric mean over samples. In the early steps a few samples turn into another image
    and differ a hundred times more than the others; an arithmetic mean is theirs alone, and thousands of trajectories
    would not settle it. Steps between the measured ones are interpolated, linearly in the logarithm.

    Args:
        cause, effect: [N, len(steps)], see `propagated`.
        steps: ascending positions.

    Raises:
        DataError: an error of a measured step is 0: there is nothing to propagate.
    """
    if not bool((cause > 0).all()):
        raise DataError("a step has no quantization error at the lowest width: its propagation cannot be measured")
    # an error that is forgotten entirely would have the logarithm of 0
    measured = (effect / cause).clamp(min=1e-12).log().mean(0).exp()
    at = torch.tensor(list(steps), dtype=torch.float64)
    wanted = torch.arange(n_steps, dtype=torch.float64)
    right = torch.searchsorted(at, wanted).clamp(1, max(len(at) - 1, 1))
    if len(at) == 1:
        return measured.expand(n_steps).clone()
    share = ((wanted - at[right - 1]) / (at[right] - at[right - 1])).clamp(0, 1)
    return torch.lerp(measured.log()[right - 1], measured.log()[right], share).exp()


def measured_steps(n_steps: int, most: int) -> list[int]:
    """At most `most` positions, evenly spread over 0..n_steps-1, both ends included."""
    count = min(most, n_steps)
    return [round(i * (n_steps - 1) / max(count - 1, 1)) for i in range(count)]


class _Replayed:
    """Gives the first estimates from memory, in the order of the steps, and asks the denoiser for the rest."""

    def __init__(self, denoiser: Denoiser, estimates: Sequence[Tensor]) -> None:
        self.denoiser, self.estimates = denoiser, list(reversed(estimates))

    def __call__(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        return self.estimates.pop() if self.estimates else self.denoiser(x, t, **conditions)
