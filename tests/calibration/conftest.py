"""A model in closed form: elementwise, so that a state does not depend on the batch it is computed in."""

import pytest
import torch
from torch import nn

from ptq_exp.diffusion import DiffusionModel, NoiseSchedule


class ClosedForm(nn.Module):
    """eps(x, t, y) = 0.8 x + 0.3 sin(0.7 x + 0.05 t + 0.2 y); `batches` lists the batch size of each call."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, x, t, y=None):
        self.batches.append(len(x))
        label = 0 if y is None else 0.2 * y.view(-1, 1, 1, 1)
        return 0.8 * x + 0.3 * torch.sin(0.7 * x + 0.05 * t.view(-1, 1, 1, 1) + label)


@pytest.fixture
def toy() -> DiffusionModel:
    """States [N, 1, 4, 4], a linear schedule of 40 steps."""
    betas = torch.linspace(1e-3, 0.2, 40, dtype=torch.float64)
    schedule = NoiseSchedule((1 - betas).cumprod(0))
    return DiffusionModel("toy", ClosedForm(), schedule, (1, 4, 4), clip_sample=False, digest="0")
