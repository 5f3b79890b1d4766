"""A network small enough for unit tests: two conditioned residual blocks with a layer before and after."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from ptq_exp.calibration import CalibrationSet
from ptq_exp.quantization import PerChannel, Policy, QuantSpec, Rule, TensorSpec, Widths, calibrate_, quantize_


class Residual(nn.Module):
    """Two convolutions around a bias per channel that depends on the time; called with a keyword, as diffusers does."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.time = nn.Linear(4, channels)

    def forward(self, x, temb=None, *, scale=1.0, extra=None):
        h = torch.relu(self.conv1(x) + self.time(temb)[:, :, None, None])
        return (x + scale * self.conv2(h),)


class Toy(nn.Module):
    """eps(x [N, 1, 6, 6], t [N]) -> [N, 1, 6, 6]."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(2, 4)
        self.conv_in = nn.Conv2d(1, 6, 3, padding=1)
        self.resnets = nn.ModuleList([Residual(6), Residual(6)])
        self.dropout = nn.Dropout(0.5)
        self.conv_out = nn.Conv2d(6, 1, 3, padding=1)

    def forward(self, x, t, y=None):
        temb = torch.tanh(self.embed(torch.stack([t / 1000, torch.cos(t)], 1)))
        h = self.conv_in(x)
        for block in self.resnets:
            (h,) = block(h, temb=temb, scale=0.5)
        return self.conv_out(self.dropout(torch.relu(h)))


@pytest.fixture(scope="session")
def toy() -> nn.Module:
    """Full precision, random weights, in evaluation mode."""
    torch.manual_seed(0)
    return Toy().eval().requires_grad_(False)


@pytest.fixture(scope="session")
def calibration_set() -> CalibrationSet:
    """40 random states."""
    rng = np.random.default_rng(0)
    return CalibrationSet(
        rng.standard_normal((40, 1, 6, 6), dtype=np.float32), np.zeros(40, dtype=np.int64),
        rng.uniform(0, 1000, 40).astype(np.float32), np.zeros(40, dtype=np.int64),
    )


@pytest.fixture
def quantized(toy, calibration_set):
    """Function (weight bits, activation bits or None) -> a calibrated copy of `toy`."""

    def make(weight: int, activation: int | None = 8) -> nn.Module:
        quantized = copy.deepcopy(toy)
        if activation is None:
            rules = [Rule("*", QuantSpec(weight=TensorSpec(weight, granularity=PerChannel())))]
        else:
            rules = Policy(first=(), last=(), attention=False).rules(Widths(weight, activation))
        quantize_(quantized, rules, (torch.zeros(1, 1, 6, 6), torch.zeros(1)))
        calibrate_(quantized, "minmax", [(x, t) for x, t, _ in calibration_set.batches(16)])
        return quantized

    return make
