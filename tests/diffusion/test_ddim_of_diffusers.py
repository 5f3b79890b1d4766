"""What the DDIM of diffusers does in another way than the papers' code: eps beside a clipped x0, and strides."""

import pytest
import torch
from diffusers import DDIMScheduler

from ptq_exp.calibration import StateRequest, source
from ptq_exp.diffusion import DiffusionModel, NoiseSchedule, SampleNoise, TimeGrid, ddim_step, sample
from ptq_exp.diffusion.noise import CALIBRATION

BETAS = {"beta_start": 1e-4, "beta_end": 0.01}


def schedule(**settings):
    levels = DDIMScheduler(**BETAS).alphas_cumprod.double()
    return NoiseSchedule(levels, steps_offset=0, **settings)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rederive", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_eps_beside_a_clipped_x0(rederive, eta):
    scheduler = DDIMScheduler(**BETAS)
    scheduler.set_timesteps(10)
    x, eps, z = (normal(seed, 4, 3, 8, 8) for seed in range(3))
    step = scheduler.step(eps, 500, x, eta=eta, use_clipped_model_output=rederive, variance_noise=z)
    levels = scheduler.alphas_cumprod.double()
    settings = {"clip_sample": True, "rederive_eps": rederive}
    found, x0 = ddim_step(x, eps, float(levels[500]), float(levels[400]), eta, z, **settings)
    torch.testing.assert_close(found, step.prev_sample, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x0, step.pred_original_sample, rtol=1e-5, atol=1e-5)
    assert 0.1 < float((x0.abs() == 1).float().mean()) < 0.9


def test_noise_in_a_kept_eps_takes_the_place_of_the_steps_own():
    """Where x0 is clamped it reaches x_prev through the direction alone: the variance is that of full precision."""
    n, q, level, previous = 400_000, 0.1, 0.3, 0.5
    x = torch.full((1, 1, 1, n), 4.0)
    noisy, z = q * normal(1, 1, 1, 1, n), normal(2, 1, 1, 1, n)
    settings = {"clip_sample": True, "rederive_eps": False}
    found, x0 = ddim_step(x, noisy, level, previous, 0.7, z, eps_noise_std=q, **settings)
    exact, _ = ddim_step(x, torch.zeros_like(x), level, previous, 0.7, z, **settings)
    assert bool((x0 == 1).all())
    torch.testing.assert_close(found.mean(), exact.mean(), rtol=2e-3, atol=0)
    torch.testing.assert_close(found.var(), exact.var(), rtol=1e-2, atol=0)


@pytest.mark.parametrize(("spacing", "steps", "same"), [
    ("leading", 10, True), ("leading", 7, True), ("trailing", 10, True), ("trailing", 7, False),
    ("linspace", 10, False), ("quad", 10, True),
])
def test_strides(spacing, steps, same):
    following = TimeGrid.from_schedule(schedule(), steps, spacing)
    constant = TimeGrid.from_schedule(schedule(constant_stride=True), steps, spacing)
    assert torch.equal(following.timesteps, constant.timesteps)
    assert torch.equal(following.alphas_cumprod_prev, constant.alphas_cumprod_prev) == same
    if spacing != "quad":
        levels = schedule().alphas_cumprod
        ends = [int(t) - 1000 // steps for t in constant.timesteps]
        assert constant.alphas_cumprod_prev.tolist() == [float(levels[end]) if end >= 0 else 1.0 for end in ends]


@pytest.mark.parametrize("settings", [{}, {"rederive_eps": False}, {"constant_stride": True}])
def test_states_of_calibration_are_those_of_sampling(settings):
    class Denoiser(torch.nn.Module):
        def forward(self, x, t, y=None):
            return torch.tanh(x.flip(-1)) * 0.8

    model = DiffusionModel("own", Denoiser(), schedule(**settings), (1, 4, 4), clip_sample=True, digest="")
    grid = model.time_grid(6, "linspace")
    assert grid.rederive_eps == settings.get("rederive_eps", True)
    states, _ = source("denoise")(model, StateRequest(grid, range(3), torch.tensor([5, 5, 2]), seed=1))
    seen = {}
    sample(model.denoiser, grid, SampleNoise(1, range(3), (1, 4, 4), CALIBRATION), clip_sample=True,
           on_step=lambda record: seen.update({record.step: record.x}))
    torch.testing.assert_close(states, torch.stack([seen[5][0], seen[5][1], seen[2][2]]))
