"""How errors of single steps arrive in the final state, against a sampler that is linear and known."""

import pytest
import torch

from ptq_exp.correction import gains, measured_steps, propagated
from ptq_exp.diffusion import DiffusionModel, NoiseSchedule, step_coefficients
from ptq_exp.errors import DataError


class Zero(torch.nn.Module):
    def forward(self, x, t, y=None):
        return torch.zeros_like(x)


class Off(torch.nn.Module):
    def forward(self, x, t, y=None):
        return torch.full_like(x, 0.5)


@pytest.fixture
def model():
    return DiffusionModel("linear", Zero(), NoiseSchedule.latent_diffusion(), (1, 2, 2), False, "none")


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_network_that_does_not_answer_passes_errors_on_by_the_samplers_factors(model, eta):
    grid = model.time_grid(6, eta=eta)
    cause, effect = propagated(model, Zero(), Off(), grid, [0, 2, 5], range(3), 0)
    torch.testing.assert_close(cause, torch.full((3, 3), 0.25, dtype=torch.float64))
    for column, s in enumerate([0, 2, 5]):
        level, previous = float(grid.alphas_cumprod[s]), float(grid.alphas_cumprod_prev[s])
        later = float(grid.alphas_cumprod_prev[-1]) / previous  # sqrt of it: what the other steps multiply x with
        wanted = step_coefficients(level, previous, eta).eps ** 2 * later
        assert float((effect / cause)[:, column].mean()) == pytest.approx(wanted, rel=1e-3)


def test_gains_are_interpolated_in_the_logarithm():
    cause = torch.ones(2, 2, dtype=torch.float64)
    effect = torch.tensor([[1.0, 100.0], [1.0, 100.0]], dtype=torch.float64)
    torch.testing.assert_close(gains(cause, effect, [0, 2], 3), torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64))
    assert gains(cause[:, :1], effect[:, 1:], [1], 3).tolist() == pytest.approx([100.0] * 3)
    with pytest.raises(DataError, match="no quantization error at the lowest width"):
        gains(torch.zeros(2, 1), effect[:, :1], [0], 3)


def test_a_sample_that_turns_into_another_image_does_not_decide_alone():
    cause = torch.ones(64, 1, dtype=torch.float64)
    effect = torch.full((64, 1), 0.01, dtype=torch.float64)
    effect[7] = 1.0
    assert 0.01 < float(gains(cause, effect, [0], 1)) < 0.011


def test_measured_steps_hold_both_ends():
    assert measured_steps(250, 6) == [0, 50, 100, 149, 199, 249]
    assert measured_steps(3, 20) == [0, 1, 2] and measured_steps(1, 20) == [0]
