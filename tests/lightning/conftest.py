"""The embedded model, a quantized copy of it, and a model in closed form."""

import pytest
import torch
from torch import nn

from ptq_exp.diffusion import DiffusionModel, NoiseSchedule
from ptq_exp.embedded import digits_model
from ptq_exp.lightning import make_trainer
from ptq_exp.quantization import Policy, Widths, calibrate_, quantize_


class ClosedForm(nn.Module):
    """eps(x, t) = 0.8 x + 0.3 sin(0.7 x + 0.05 t)."""

    def forward(self, x, t, y=None):
        return 0.8 * x + 0.3 * torch.sin(0.7 * x + 0.05 * t.view(-1, 1, 1, 1))


class Counting(nn.Module):
    """`inner`, counting its calls; before call number `fails_at` (from 1) it calls `fail`."""

    def __init__(self, inner, fails_at=None, fail=None):
        super().__init__()
        self.inner, self.fails_at, self.fail, self.calls = inner, fails_at, fail, 0

    def forward(self, x, t, **conditions):
        self.calls += 1
        if self.calls == self.fails_at:
            self.fail()
        return self.inner(x, t, **conditions)


@pytest.fixture(scope="session")
def digits() -> DiffusionModel:
    """The embedded model."""
    return digits_model()


@pytest.fixture(scope="session")
def quantized(digits) -> nn.Module:
    """The embedded model's denoiser at 8 bits."""
    quantized = digits.copy_denoiser()
    quantize_(quantized, Policy().rules(Widths(8, 8)), digits.example_inputs())
    grid, states = digits.time_grid(4), []
    digits.sample(digits.denoiser, grid, range(100, 104), 0, on_step=states.append)
    calibrate_(quantized, "minmax", [(r.x, grid.network_time(r.step, len(r.x))) for r in states])
    return quantized


@pytest.fixture
def toy() -> DiffusionModel:
    """States [N, 1, 4, 4], a linear schedule of 40 steps; a state does not depend on the batch around it."""
    betas = torch.linspace(1e-3, 0.2, 40, dtype=torch.float64)
    schedule = NoiseSchedule((1 - betas).cumprod(0))
    return DiffusionModel("toy", ClosedForm(), schedule, (1, 4, 4), clip_sample=True, digest="0")


@pytest.fixture
def trainer():
    """A quiet Trainer on the CPU."""
    return make_trainer("test", accelerator="cpu", progress_bar=False)


@pytest.fixture
def counting():
    """The class `Counting`."""
    return Counting
