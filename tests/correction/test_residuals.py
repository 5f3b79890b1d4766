"""Residuals of known distribution and dependence."""

import pytest
import torch

from ptq_exp.correction import (
    fit_statistics,
    residual_histogram,
    standardised_residual,
    step_correlation,
    step_products,
)


def test_residuals_are_freed_of_slope_and_bias_and_scaled():
    g = torch.Generator().manual_seed(0)
    eps, noise = torch.randn(2, 50, 2, 8, 8, generator=g)
    eps_q = 1.1 * eps + 0.3 + 0.05 * noise
    statistics = fit_statistics(eps, eps_q, torch.zeros(50, dtype=torch.long), 1)
    residual = standardised_residual(eps, eps_q, statistics, 0)
    torch.testing.assert_close(residual, noise, rtol=0, atol=0.1)
    assert float(residual.square().mean()) == pytest.approx(1, rel=1e-4)


def test_counts_hold_every_value_and_the_outermost_bins_all_beyond():
    counts = residual_histogram(torch.tensor([[-100.0, -0.1, 0.1, 5.95, 100.0]]))
    assert counts.sum() == 5 and counts[0, [0, 29, 30, 59]].tolist() == [1, 1, 1, 2]


@pytest.mark.parametrize("rho", [0.0, 0.8, -0.5])
def test_correlation_of_consecutive_steps(rho):
    g = torch.Generator().manual_seed(1)
    steps, before = [], None
    r = torch.randn(200, 1, 8, 8, generator=g)
    for scale in (1.0, 3.0, 0.5):
        steps.append(step_products(scale * r, before))
        before = scale * r
        r = rho * r + (1 - rho**2) ** 0.5 * torch.randn(r.shape, generator=g)
    found = step_correlation(torch.stack(steps, 1))
    torch.testing.assert_close(found, torch.full((2,), rho, dtype=torch.float64), rtol=0, atol=0.03)
