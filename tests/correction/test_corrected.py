"""Corrected denoisers, and how much of their noise the sampler can take up."""

import pytest
import torch
from torch import nn

from ptq_exp.correction import Corrected, VarianceFit, fit_statistics
from ptq_exp.diffusion import NoiseSchedule, TimeGrid, step_coefficients
from ptq_exp.errors import ConfigError

SCHEDULE = NoiseSchedule.latent_diffusion()
GRID = TimeGrid.from_schedule(SCHEDULE, 3, eta=1.0)


class Biased(nn.Module):
    """Quantization noise without residual: eps_q = (1 + k_s) eps + b_s, with eps = x."""

    def forward(self, x, t, y=None):
        step = GRID.step_of(t)
        k = torch.tensor([0.2, -0.1, 0.05])[step].view(-1, 1, 1, 1)
        bias = torch.tensor([[0.1, -0.2], [0.3, 0.0], [-0.1, 0.4]])[step].view(-1, 2, 1, 1)
        return (1 + k) * x + bias


def statistics(convention="paper"):
    x = torch.randn(60, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    step = torch.arange(60) % 3
    for s in range(3):  # one slope for all channels would take up what their means and biases have in common
        x[step == s] -= x[step == s].mean((0, 2, 3), keepdim=True)
    return fit_statistics(x, Biased()(x, GRID.network_time(step)), step, 3, convention=convention)


def test_a_bias_without_residual_is_undone_step_by_step():
    corrected = Corrected(Biased(), statistics(), GRID)
    x = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    for step in range(3):
        torch.testing.assert_close(corrected(x, GRID.network_time(step, 5)), x, rtol=0, atol=2e-6)
    mixed = GRID.network_time(torch.tensor([0, 1, 2, 1, 0]))
    torch.testing.assert_close(corrected(x, mixed), x, rtol=0, atol=2e-6)


def test_the_correction_follows_the_convention():
    x = torch.ones(1, 2, 4, 4)
    t = GRID.network_time(1, 1)
    code = Corrected(Biased(), statistics("code"), GRID)
    raw = Biased()(x, t)
    torch.testing.assert_close(code(x, t), raw - statistics("code").bias[1].float().view(1, 2, 1, 1))


def test_other_grids_steps_and_channels_are_refused():
    corrected = Corrected(Biased(), statistics(), GRID)
    with pytest.raises(ConfigError, match="are those of 3 sampling steps, but the sampler takes 5"):
        Corrected(Biased(), statistics(), TimeGrid.from_schedule(SCHEDULE, 5))
    with pytest.raises(ConfigError, match="7"):
        corrected(torch.zeros(1, 2, 4, 4), torch.tensor([7.0]))
    with pytest.raises(ConfigError, match="2 channels, but the estimate has 1"):
        Corrected(Inverted(), statistics(), GRID)(torch.zeros(1, 1, 4, 4), GRID.network_time(0, 1))


class Inverted(nn.Module):
    def forward(self, x, t, y=None):
        return -x


def test_an_estimate_that_carries_nothing_is_refused():
    x = torch.randn(30, 1, 4, 4)
    found = fit_statistics(x, -x, torch.arange(30) % 3, 3)
    with pytest.raises(ConfigError, match=r"k is -1 or less in the steps \[0, 1, 2\]"):
        Corrected(Inverted(), found, GRID)


def test_variance_fits_where_the_sampler_adds_more_than_the_noise_brings():
    std = torch.tensor([0.01, 100.0, 0.01])
    fit = VarianceFit.of(GRID, std)
    for s in range(3):
        step = step_coefficients(float(GRID.alphas_cumprod[s]), float(GRID.alphas_cumprod_prev[s]), 1.0)
        assert float(fit.available[s]) == pytest.approx(step.sigma**2)
        assert float(fit.needed[s]) == pytest.approx((step.eps * float(std[s])) ** 2)
    assert fit.left[0] == 0 and fit.left[1] > 0
    assert fit.to_dict()["steps_over"] == int((fit.left > 0).sum())
    assert "fits in" in fit.summary() and "left over" in fit.summary()
    deterministic = TimeGrid.from_schedule(SCHEDULE, 3, eta=0.0)
    assert "only the mean is corrected" in VarianceFit.of(deterministic, std).summary()
