"""Steps whose eps carries noise: the published code, the moments in closed form and by Monte Carlo, and clamped x0.

golden/ptqd_steps.npz: single steps of the published code (LDM, 20 steps) at each position of its ascending time steps,
`corr` with and `plain` without correction, for a small and a large quantization error; of two images, the first.
`pred_x0` does not depend on eta and is stored once.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq_exp.diffusion import SampleNoise, ddim_step, sample, step_coefficients
from ptq_exp.errors import ConfigError

GOLDEN = Path(__file__).parents[1] / "golden"
DRAWS = 200_000
levels = st.tuples(st.floats(0.01, 0.95), st.floats(0.05, 0.95)).map(lambda v: (v[0], v[0] + v[1] * (1 - v[0])))


def moments(alpha_bar, alpha_bar_prev, eta, q, convention):
    """Coefficients of x, true eps, and the variance of x_prev, read off the step itself (it is affine in all)."""

    def mean(x, eps):
        zero = torch.zeros(1, dtype=torch.float64)
        values = torch.tensor([x], dtype=torch.float64), torch.tensor([eps], dtype=torch.float64)
        return float(ddim_step(*values, alpha_bar, alpha_bar_prev, eta, zero, q, convention)[0])

    of_x, of_eps = mean(1.0, 0.0), mean(0.0, 1.0)
    x, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    own = float(ddim_step(x, x, alpha_bar, alpha_bar_prev, eta, one, q, convention)[0])
    return of_x, of_eps, own**2 + (of_eps * q) ** 2


@pytest.mark.parametrize("mode", ["corr", "plain"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tag", ["small", "large"])
def test_steps_of_the_published_code(tag, eta, mode):
    golden = np.load(GOLDEN / "ptqd_steps.npz")
    x, eps_q, z = (torch.from_numpy(golden[f"{tag}/step_{name}"]) for name in ("x", "eq", "noise"))
    own = golden[f"{tag}/{mode}/eta{eta}/sigma_eff"]
    for i, (level, previous) in enumerate(zip(golden["ddim_alphas"], golden["ddim_alphas_prev"], strict=True)):
        eps, q = eps_q, 0.0
        if mode == "corr":
            gain = 1 + max(float(golden[f"{tag}/k"][i]), 0)
            eps = (eps_q - torch.from_numpy(golden[f"{tag}/bias"][i]).float().view(1, 3, 1, 1)) / gain
            q = float(golden[f"{tag}/resid_std"][i]) / gain
        step = [x, eps, float(level), float(previous), eta]
        x_prev, x0 = ddim_step(*step, z, q, "code")
        np.testing.assert_allclose(x0, golden[f"{tag}/{mode}/pred_x0"][i], atol=1e-5, rtol=0, err_msg=f"step {i}")
        expected = golden[f"{tag}/{mode}/eta{eta}/x_prev"][i]
        np.testing.assert_allclose(x_prev, expected, atol=1e-5, rtol=0, err_msg=f"step {i}")
        found = (x_prev - ddim_step(*step, torch.zeros_like(z), q, "code")[0]) / z
        assert float(found.median()) == pytest.approx(float(own[i]), abs=1e-5)
    assert tag == "small" or mode == "plain" or 0 in own, "at some steps the noise must not fit"


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@given(levels, st.floats(0, 1))
def test_mean_and_variance_are_those_of_the_full_precision_step_wherever_the_noise_fits(eta, pair, share):
    sigma, direction, c = step_coefficients(*pair, eta)
    q = share * sigma / abs(c)
    exact, plain = moments(*pair, eta, q, "exact"), moments(*pair, eta, 0.0, "exact")
    assert exact == pytest.approx(plain, rel=1e-9, abs=1e-12)
    assert plain == pytest.approx(((pair[1] / pair[0]) ** 0.5, c, sigma**2), rel=1e-9, abs=1e-12)
    assert direction == pytest.approx((1 - pair[1] - sigma**2) ** 0.5)


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("pair", [(0.2, 0.3), (0.5, 0.8), (0.05, 0.12)])
def test_monte_carlo_tells_the_exact_step_from_the_published_one(eta, pair):
    """Standard errors: sqrt(v / n) of a mean, v sqrt(2 / n) of a variance; five of them are allowed."""
    sigma, _, c = step_coefficients(*pair, eta)
    q, x, true_eps = 0.9 * sigma / abs(c), 0.7, -0.4
    generator = torch.Generator().manual_seed(7)
    n, z = torch.randn(2, DRAWS, generator=generator, dtype=torch.float64)
    states = torch.full((DRAWS,), x, dtype=torch.float64)
    target = float(ddim_step(states[:1], states[:1] * 0 + true_eps, *pair, eta, z[:1] * 0)[0])
    mean_error, variance_error = 5 * sigma / DRAWS**0.5, 5 * sigma**2 * (2 / DRAWS) ** 0.5
    exact, _ = ddim_step(states, true_eps + q * n, *pair, eta, z, q)
    assert abs(float(exact.mean()) - target) < mean_error
    assert abs(float(exact.var()) - sigma**2) < variance_error
    code, _ = ddim_step(states, true_eps + q * n, *pair, eta, z, q, "code")
    assert abs(float(code.mean()) - target) > 2 * mean_error
    assert abs(float(code.var()) - sigma**2) > 2 * variance_error
    # without a correction the noise comes on top
    uncorrected, _ = ddim_step(states, true_eps + q * n, *pair, eta, z)
    assert abs(float(uncorrected.var()) - 1.81 * sigma**2) < 1.81 * variance_error


@given(levels)
def test_ancestral_sampling_is_eta_one(pair):
    """Ho et al. 2020, algorithm 2, with the posterior variance; PTQD gives its coefficient of eps in these symbols."""
    alpha_bar, alpha_bar_prev = pair
    alpha = alpha_bar / alpha_bar_prev
    beta = 1 - alpha
    posterior = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
    x, eps, z = torch.randn(3, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x_prev, _ = ddim_step(x, eps, alpha_bar, alpha_bar_prev, 1.0, z)
    ancestral = (x - beta / (1 - alpha_bar) ** 0.5 * eps) / alpha**0.5 + posterior**0.5 * z
    torch.testing.assert_close(x_prev, ancestral, rtol=1e-9, atol=1e-9)
    c_squared = beta**2 / (alpha * (1 - alpha_bar))
    assert step_coefficients(*pair, 1.0).eps ** 2 == pytest.approx(c_squared, rel=1e-7)
    q = 0.5 * (posterior / c_squared) ** 0.5
    corrected, _ = ddim_step(x, eps, alpha_bar, alpha_bar_prev, 1.0, z, q)
    expected = ancestral + ((posterior - c_squared * q**2) ** 0.5 - posterior**0.5) * z
    torch.testing.assert_close(corrected, expected, rtol=1e-7, atol=1e-9)


def test_noise_that_does_not_fit_takes_the_place_of_all_noise_and_leaves_the_mean():
    x, eps, z = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    sigma, direction, c = step_coefficients(0.3, 0.5, 0.5)
    q = 1.5 * sigma / abs(c)
    x_prev, x0 = ddim_step(x, eps, 0.3, 0.5, 0.5, z, q)
    assert torch.equal(x_prev, ddim_step(x, eps, 0.3, 0.5, 0.5, torch.zeros_like(z))[0])
    code, _ = ddim_step(x, eps, 0.3, 0.5, 0.5, z, q, "code")
    assert torch.equal(code, ddim_step(x, eps, 0.3, 0.5)[0]) and float((code - x_prev).abs().max()) > 1e-2


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("convention", ["exact", "code"])
def test_nothing_changes_without_noise_of_the_step_or_of_eps(convention, clip):
    x, eps, z = torch.randn(3, 64, generator=torch.Generator().manual_seed(3))
    for eta, q in [(0.0, 0.7), (1.0, 0.0), (0.3, 0.0)]:
        plain = ddim_step(x, eps, 0.3, 0.5, eta, z, clip_sample=clip)
        found = ddim_step(x, eps, 0.3, 0.5, eta, z, q, convention, clip_sample=clip)
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_elements_whose_x0_was_clamped_keep_the_noise_of_the_step(dtype):
    x, eps, z = torch.randn(3, 400, generator=torch.Generator().manual_seed(4), dtype=dtype)
    step = (0.4, 0.6, 1.0)
    clamped = ((x - 0.6**0.5 * eps) / 0.4**0.5).abs() > 1
    assert 50 < int(clamped.sum()) < 350
    sigma, _, c = step_coefficients(*step)
    q = 0.8 * sigma / abs(c)
    plain, _ = ddim_step(x, eps, *step, z, clip_sample=True)
    found, x0 = ddim_step(x, eps, *step, z, q, clip_sample=True)
    assert found.dtype == dtype and float(x0.abs().max()) == 1
    assert torch.equal(found[clamped], plain[clamped])
    torch.testing.assert_close(found - plain, torch.where(clamped, 0, (0.6 - 1) * sigma * z), rtol=0, atol=1e-6)
    # eps that is derived from a clamped x0 does not depend on the noise
    noisy, _ = ddim_step(x, eps + 1e-3, *step, z, q, clip_sample=True)
    still = clamped & (((x - 0.6**0.5 * (eps + 1e-3)) / 0.4**0.5).abs() > 1)
    assert torch.equal(noisy[still], found[still]) and not bool((noisy == found)[~clamped].any())


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_coefficients_of_many_steps_at_once(toy, eta):
    grid = toy.time_grid(12, eta=eta)
    together = step_coefficients(grid.alphas_cumprod, grid.alphas_cumprod_prev, eta)
    for step in range(len(grid)):
        one = step_coefficients(float(grid.alphas_cumprod[step]), float(grid.alphas_cumprod_prev[step]), eta)
        assert [float(value[step]) for value in together] == pytest.approx(list(one), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("convention", ["exact", "code"])
def test_each_step_of_a_run_takes_its_own_deviation(toy, convention):
    grid, records = toy.time_grid(6, eta=1.0), []
    stds = torch.tensor([0.0, 0.1, 0.2, 0.05, 3.0, 0.1])
    settings = {"eps_noise_std": stds, "convention": convention}
    toy.sample(toy.denoiser, grid, [3, 8], 1, on_step=records.append, **settings)
    noise = SampleNoise(1, [3, 8], toy.sample_shape)
    noise.draw()
    for r, q in zip(records, stds.tolist(), strict=True):
        levels = float(grid.alphas_cumprod[r.step]), float(grid.alphas_cumprod_prev[r.step])
        assert torch.equal(r.x_prev, ddim_step(r.x, r.eps, *levels, 1.0, noise.draw(), q, convention)[0])
    part = toy.run(toy.denoiser, grid, [3, 8], 1, steps=3, **settings)
    assert torch.equal(part, records[2].x_prev)
    nothing = toy.run(toy.denoiser, grid, [3, 8], 1, eps_noise_std=torch.zeros(6), convention=convention)
    assert torch.equal(nothing, toy.run(toy.denoiser, grid, [3, 8], 1))


def test_impossible_settings_are_named(toy):
    x = torch.zeros(2)
    with pytest.raises(ConfigError, match="^convention=paper: choose one of exact, code$"):
        ddim_step(x, x, 0.3, 0.5, 1.0, x, 0.1, "paper")
    for q in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=rf"eps_noise_std={q}: .* 0 or more"):
            ddim_step(x, x, 0.3, 0.5, 1.0, x, q)
    with pytest.raises(ConfigError, match="eps_noise_std has 5 values, but the grid has 6 steps"):
        noise = SampleNoise(0, [0], toy.sample_shape)
        sample(toy.denoiser, toy.time_grid(6, eta=1.0), noise, eps_noise_std=torch.zeros(5))
