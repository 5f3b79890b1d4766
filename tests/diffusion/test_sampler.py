"""The sampler against trajectories of the original code, `diffusers`, the DDPM posterior and exact solutions.

golden/sampler_*.npz: the samplers of improved-diffusion (`iddpm`), DDIM (`generalized`) and latent diffusion with
guidance (`ldm`) on the closed-form network; of the stored states, every third and the last.
"""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import example, given
from hypothesis import strategies as st

from ptq_exp.diffusion import Guided, NoiseSchedule, SampleNoise, TimeGrid, ddim_step, padded_batches, sample

GOLDEN = Path(__file__).parents[1] / "golden"


class Rows:
    """Noise that is supplied: one array [N, C, H, W] per draw."""

    def __init__(self, rows):
        self.rows = iter(rows)

    def draw(self):
        return torch.from_numpy(np.asarray(next(self.rows), dtype=np.float32))


def cosine_alphas_cumprod(total):
    """Nichol and Dhariwal 2021, eq. 17, with their cap on beta; float64 [T]."""

    def f(t):
        return math.cos((t / total + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - f(i + 1) / f(i), 0.999) for i in range(total)]
    return (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0)


def alphas_of_betas(betas):
    return (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0)


LATENT = NoiseSchedule.latent_diffusion()
LINEAR = NoiseSchedule(alphas_of_betas(np.linspace(1e-4, 0.02, 1000).astype(np.float32)), steps_offset=0)
COSINE = NoiseSchedule(cosine_alphas_cumprod(4000), time_scale=1000 / 4000, steps_offset=0)
TRAJECTORIES = {
    "iddpm_cosine4000_100_eta0": (COSINE, "linspace"),
    "iddpm_cosine4000_250_eta0": (COSINE, "linspace"),
    "iddpm_cosine4000_250_eta1": (COSINE, "linspace"),
    "iddpm_cosine4000_ddim250_eta0": (COSINE, "leading"),
    "generalized_uniform_100_eta0": (LINEAR, "leading"),
    "generalized_uniform_100_eta1": (LINEAR, "leading"),
    "generalized_quad_100_eta0": (LINEAR, "quad"),
    "generalized_quad_100_eta0.5": (LINEAR, "quad"),
    "ldm_S20_eta0_scale1.5": (LATENT, "leading"),
    "ldm_S20_eta0_scale3": (LATENT, "leading"),
    "ldm_S20_eta1_scale1.5": (LATENT, "leading"),
    "ldm_S20_eta1_scale3": (LATENT, "leading"),
    "ldm_S200_eta1_scale1": (LATENT, "leading"),
    "ldm_S250_eta0_scale1.5": (LATENT, "leading"),
    "ldm_S250_eta1_scale1.5": (LATENT, "leading"),
}


@pytest.mark.parametrize("case", list(TRAJECTORIES))
def test_trajectories_of_the_original_samplers(case, toy):
    golden = np.load(GOLDEN / f"sampler_{case}.npz")
    schedule, spacing = TRAJECTORIES[case]
    in_order = golden["fed_timesteps" if "fed_timesteps" in golden else "ddim_timesteps"]
    steps, eta = len(in_order), float(golden["eta"])
    grid = TimeGrid.from_schedule(schedule, steps, spacing, eta=eta)
    assert np.array_equal(grid.network_time(torch.arange(steps)).numpy(), np.sort(in_order)[::-1].astype(np.float32))

    shape = tuple(golden["x_shape"])
    start = np.random.default_rng(int(golden["x_T_seed"])).standard_normal(shape)
    rows = [start]
    if eta > 0:
        rows += list(np.random.default_rng(int(golden["noise_seed"])).standard_normal((steps, *shape)))
    denoiser, conditions = toy.denoiser, {}
    if "labels" in golden:
        conditions = {"y": torch.from_numpy(golden["labels"]).long()}
        denoiser = Guided(toy.denoiser, float(golden["guidance_scale"]), {"y": int(golden["uncond_label"])})
    states = [torch.from_numpy(start.astype(np.float32))]
    last = sample(
        denoiser, grid, Rows(rows), conditions=conditions, clip_sample=schedule is COSINE,
        on_step=lambda r: states.append(r.x_prev),
    )
    assert torch.equal(last, states[-1]) and len(states) == steps + 1
    for index, expected in zip(golden["traj_index"], golden["traj"], strict=True):
        np.testing.assert_allclose(states[index], expected, atol=5e-5, rtol=0, err_msg=f"step {index}")


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [10, 1000])
def test_one_step_agrees_with_diffusers_where_its_constant_stride_is_exact(steps, eta, clip):
    scheduler = DDIMScheduler(
        1000, beta_schedule="squaredcos_cap_v2", clip_sample=clip, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(steps)
    levels = scheduler.alphas_cumprod.double()
    generator = torch.Generator().manual_seed(steps)
    for t in [*scheduler.timesteps[:: max(1, steps // 6)].tolist(), int(scheduler.timesteps[-1])]:
        x, eps, z = torch.randn(3, 2, 1, 4, 4, generator=generator)
        expected = scheduler.step(eps, t, x, eta=eta, use_clipped_model_output=clip, variance_noise=z)
        before = t - 1000 // steps
        alpha_bar_prev = float(levels[before]) if before >= 0 else 1.0
        x_prev, x0 = ddim_step(x, eps, float(levels[t]), alpha_bar_prev, eta, z, clip_sample=clip)
        scale = float(expected.pred_original_sample.abs().max())
        torch.testing.assert_close(x0, expected.pred_original_sample, rtol=0, atol=2e-5 * max(scale, 1))
        # at the noisiest step x0 reaches 1e4, and 1 - alpha_bar of the float32 schedule is good to three digits
        torch.testing.assert_close(x_prev, expected.prev_sample, rtol=1e-3, atol=2e-5 * max(scale, 1))


@example(0.25, 0.9999999999999999, 0)
@given(st.floats(1e-8, 0.999), st.floats(1e-4, 1), st.integers(0, 99))
def test_eta_one_is_the_ddpm_posterior(alpha_bar, share, seed):
    """Ho et al. 2020, eq. 7: mean and variance of q(x_prev | x_t, x_0)."""
    alpha_bar_prev = alpha_bar + share * (1 - alpha_bar)
    x, eps, z = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x_prev, x0 = ddim_step(x, eps, alpha_bar, alpha_bar_prev, 1.0, z)
    alpha = alpha_bar / alpha_bar_prev
    beta = 1 - alpha
    mean = (alpha_bar_prev**0.5 * beta * x0 + alpha**0.5 * (1 - alpha_bar_prev) * x) / (1 - alpha_bar)
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * beta
    tolerance = 1e-9 * float(x0.abs().max())
    torch.testing.assert_close(x_prev, mean + variance**0.5 * z, rtol=1e-6, atol=tolerance)


def test_clipping_bounds_x0_and_stays_consistent_with_the_state():
    x, eps = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    x_prev, x0 = ddim_step(x, eps, 0.1, 0.5, clip_sample=True)
    assert x0.abs().max() == 1
    implied = (x - 0.1**0.5 * x0) / 0.9**0.5
    torch.testing.assert_close(x_prev, 0.5**0.5 * x0 + 0.5**0.5 * implied)


@pytest.mark.parametrize("steps", [1, 5, 40])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_exact_denoiser_of_one_image_leads_to_that_image(toy, steps, eta):
    target = torch.tensor([[[0.5, -0.25], [1.0, -1.0]]])
    grid = toy.time_grid(steps, eta=eta)
    levels = dict(zip(grid.timesteps.tolist(), grid.alphas_cumprod.tolist(), strict=True))

    def exact(x, t):
        alpha_bar = levels[float(t[0])]
        return (x - alpha_bar**0.5 * target) / (1 - alpha_bar) ** 0.5

    x = sample(exact, grid, SampleNoise(0, range(3), (1, 2, 2)))
    torch.testing.assert_close(x, target.expand(3, 1, 2, 2), rtol=0, atol=1e-5)
    # part of the way, eta 0: the straight mixture of the image and the initial estimate of the noise
    if eta == 0 and steps > 1:
        part = sample(exact, grid, SampleNoise(0, range(3), (1, 2, 2)), steps=steps // 2)
        first, reached = float(grid.alphas_cumprod[0]), float(grid.alphas_cumprod[steps // 2])
        z = (SampleNoise(0, range(3), (1, 2, 2)).draw() - first**0.5 * target) / (1 - first) ** 0.5
        torch.testing.assert_close(part, reached**0.5 * target + (1 - reached) ** 0.5 * z, rtol=0, atol=1e-5)


def test_records_hold_the_state_that_enters_the_step(toy):
    records, y, noise = [], torch.tensor([4, 7]), SampleNoise(1, [3, 8], (1, 2, 2))
    last = sample(toy.denoiser, toy.time_grid(6), noise, conditions={"y": y}, on_step=records.append)
    assert [r.step for r in records] == [0, 1, 2, 3, 4, 5]
    assert torch.equal(records[0].x, SampleNoise(1, [3, 8], (1, 2, 2)).draw())
    for record, following in itertools.pairwise(records):
        assert torch.equal(record.x_prev, following.x)
    assert torch.equal(last, records[-1].x_prev) and torch.equal(last, records[-1].x0)
    times, calls = toy.time_grid(6).timesteps.tolist(), list(toy.denoiser.calls)
    for record, (x, t, label), time in zip(records, calls, times, strict=True):
        assert torch.equal(x, record.x) and t.tolist() == [time, time] and label is y
        assert torch.equal(record.eps, toy.denoiser(record.x, t, y))


@given(st.integers(1, 50), st.integers(1, 12))
def test_padded_batches_cover_all_samples_with_one_shape(n, batch_size):
    batches = padded_batches(n, batch_size)
    assert {len(batch) for batch in batches} == {batch_size}
    assert [i for batch in batches for i in batch][:n] == list(range(n))
    assert len(batches) == math.ceil(n / batch_size)
