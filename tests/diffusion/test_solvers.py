"""Solvers of diffusers on exact denoisers, against DDIM on the same noise, and on the embedded model."""

import copy
import itertools
import pickle
from dataclasses import replace

import pytest
import torch

from ptq_exp.diffusion import SOLVERS, DiffusionModel, NoiseSchedule, SampleNoise, TimeGrid, sample, solver_grid
from ptq_exp.embedded import digits_model
from ptq_exp.errors import ConfigError

OTHERS = SOLVERS[1:]
LATENT = NoiseSchedule.latent_diffusion()
MEAN, STD = 0.4, 0.3


def exact(grid):
    """E[eps | x_t] for data N(MEAN, STD^2): eps = sqrt(1 - a) (x - sqrt(a) MEAN) / (a STD^2 + 1 - a)."""

    def denoiser(x, t):
        a = grid.alphas_cumprod[grid.step_of(t)].float().view(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * MEAN) / (a * STD**2 + 1 - a)

    return denoiser


def flow(start, grid, alpha_bar):
    """Where the probability flow of that denoiser takes the states `start` of the grid's first level."""

    def moments(a):
        return a**0.5 * MEAN, (a * STD**2 + 1 - a) ** 0.5

    (mean, std), (mean_to, std_to) = moments(float(grid.alphas_cumprod[0])), moments(alpha_bar)
    return mean_to + std_to * (start - mean) / std


def drawn(grid, n=2000):
    """The final states of `n` samples with the exact denoiser, and the records."""
    records = []
    return sample(exact(grid), grid, SampleNoise(0, range(n), (1, 2, 2)), on_step=records.append), records


@pytest.fixture(scope="module")
def digits():
    return digits_model()


@pytest.fixture
def fine(toy) -> DiffusionModel:
    """The closed-form denoiser on a schedule of 1000 steps."""
    return replace(toy, schedule=replace(LATENT, final_alpha_cumprod=1.0))


# deviations found: 0.0073, 0.0033, 0.012, 0.015; DDIM's is 0.27 with 20 steps
@pytest.mark.parametrize(
    "solver, steps, bound",
    [("dpm_solver", 20, 0.015), ("dpm_solver", 100, 0.007), ("pndm", 100, 0.025), ("euler", 500, 0.03)],
)
def test_states_follow_the_exact_flow_of_gaussian_data(solver, steps, bound):
    grid = solver_grid(LATENT, steps, "leading", solver=solver)
    _, records = drawn(grid)
    for r in records:
        expected = flow(records[0].x, grid, float(grid.alphas_cumprod[r.step]))
        assert float((r.x - expected).abs().max()) < bound, r.step


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("solver, steps", [("dpm_solver", 100), ("pndm", 100), ("euler", 250)])
def test_samples_have_the_mean_and_the_deviation_of_the_data(solver, steps, spacing):
    """8000 values: standard errors 0.0034 and 0.0024; the last step of first order is off by 0.016 in the deviation."""
    if (solver, spacing) == ("pndm", "linspace"):
        pytest.skip("this scheduler cannot follow evenly spaced times with both ends")
    x, _ = drawn(solver_grid(LATENT, steps, spacing, solver=solver))
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.012)
    assert float(x.std()) == pytest.approx(STD, abs=0.02)


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_euler_steps_are_those_of_ddim(fine, steps):
    """The same update, x / sqrt(alpha_bar) being the state: also at few steps (Song et al. 2021, eq. 13)."""
    ddim, euler = fine.time_grid(steps, "leading"), fine.time_grid(steps, "leading", solver="euler")
    assert torch.equal(ddim.timesteps, euler.timesteps)
    torch.testing.assert_close(ddim.alphas_cumprod, euler.alphas_cumprod, rtol=1e-4, atol=0)
    found, expected = (fine.sample(fine.denoiser, grid, range(50), 2) for grid in (euler, ddim))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


# deviations found: 0.035, 0.013, 0.004
@pytest.mark.parametrize("solver, steps, bound", [("dpm_solver", 199, 0.07), ("pndm", 250, 0.03), ("euler", 500, 0.01)])
def test_many_steps_converge_to_many_steps_of_ddim(fine, solver, steps, bound):
    """On a denoiser that is not linear in x; states reach 4."""
    expected = fine.sample(fine.denoiser, fine.time_grid(1000, "leading"), range(50), 2)

    def deviation(steps):
        grid = fine.time_grid(steps, "leading", solver=solver)
        return float((fine.sample(fine.denoiser, grid, range(50), 2) - expected).abs().max())

    assert deviation(steps) < bound < deviation(steps // 10) / 2


# root mean square errors found: 0.034, 0.060, 0.044; DDIM with 100 steps differs by 0.15, another image by 0.71
@pytest.mark.parametrize("solver", OTHERS)
def test_images_of_the_embedded_model_are_near_those_of_ddim(digits, solver):
    expected = digits.sample(digits.denoiser, digits.time_grid(10), range(16), 3)
    found = digits.sample(digits.denoiser, digits.time_grid(10, solver=solver), range(16), 3)
    assert float((found - expected).square().mean().sqrt()) < 0.12
    assert float(torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1]) > 0.985


@pytest.mark.parametrize("solver", OTHERS)
def test_an_image_does_not_depend_on_its_batch_or_on_an_earlier_run(toy, solver):
    grid = toy.time_grid(7, "leading", solver=solver)
    together = toy.sample(toy.denoiser, grid, range(6), 0)
    for chosen in ([4], [5, 0, 2]):
        assert torch.equal(toy.sample(toy.denoiser, grid, chosen, 0), together[chosen])


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("solver", OTHERS)
def test_records_hold_what_the_network_received(toy, solver, spacing):
    grid, records = toy.time_grid(8, spacing, solver=solver), []
    last = toy.sample(toy.denoiser, grid, range(40), 1, on_step=records.append)
    calls = list(toy.denoiser.calls)
    assert [r.step for r in records] == list(range(len(grid))) and len(calls) == len(grid) and grid.solver == solver
    for r, (x, t, _) in zip(records, calls, strict=True):
        assert torch.equal(x, r.x) and torch.equal(t, grid.network_time(r.step, 40))
        assert torch.equal(toy.denoiser(r.x, t), r.eps)
        level = float(grid.alphas_cumprod[r.step])
        torch.testing.assert_close(level**0.5 * r.x0 + (1 - level) ** 0.5 * r.eps, r.x, rtol=0, atol=1e-5)
    for r, following in itertools.pairwise(records):
        assert torch.equal(r.x_prev, following.x)
    assert torch.equal(last, records[-1].x_prev)
    for steps in (0, 3):
        part = toy.sample(toy.denoiser, grid, range(40), 1, steps=steps)
        assert torch.equal(part, records[steps].x)


@pytest.mark.parametrize("solver, steps", [("dpm_solver", 100), ("pndm", 100), ("euler", 250)])
def test_states_have_the_variance_preserving_scale(solver, steps):
    """std^2 = a STD^2 + 1 - a, also where the solver keeps x0 + sigma eps."""
    grid = solver_grid(LATENT, steps, "leading", solver=solver)
    _, records = drawn(grid)
    for r in records[:: steps // 5]:
        level = float(grid.alphas_cumprod[r.step])
        assert float(r.x.std()) == pytest.approx((level * STD**2 + 1 - level) ** 0.5, rel=0.04)


@pytest.mark.parametrize("solver", OTHERS)
def test_recorded_x0_is_clamped_where_the_model_clips(toy, solver):
    records = []
    model = replace(toy, clip_sample=True)
    grid = toy.time_grid(8, "leading", solver=solver)
    clipped = model.sample(model.denoiser, grid, range(40), 1, on_step=records.append)
    assert max(float(r.x0.abs().max()) for r in records) == 1
    assert torch.equal(clipped, toy.sample(toy.denoiser, grid, range(40), 1))


def test_times_and_levels_of_each_solver_by_hand():
    dpm = solver_grid(LATENT, 10, "leading", solver="dpm_solver")
    assert dpm.timesteps.tolist() == list(range(901, 1, -90))  # 1000 // 11 = 90, and the clean end is left out
    euler = solver_grid(LATENT, 4, "linspace", solver="euler")
    assert euler.timesteps.tolist() == [999, 666, 333, 0]
    pndm = solver_grid(LATENT, 5, "leading", solver="pndm")
    assert pndm.timesteps.tolist() == [801, 601, 601, 401, 201, 1]
    assert pndm.first_with_time.tolist() == [0, 1, 1, 3, 4, 5]
    for grid in (dpm, euler, pndm):
        expected = LATENT.alphas_cumprod[grid.timesteps.long()]
        torch.testing.assert_close(grid.alphas_cumprod, expected, rtol=1e-4, atol=0)
        assert torch.equal(grid.alphas_cumprod_prev[:-1], grid.alphas_cumprod[1:])
        assert float(grid.alphas_cumprod_prev[-1]) == pytest.approx(LATENT.final_alpha_cumprod, abs=1e-6)
        assert grid.eta == 0 and grid.timesteps.dtype == torch.float64


@pytest.mark.parametrize("solver", OTHERS)
def test_a_schedule_that_ends_clean_ends_clean(solver):
    grid = solver_grid(replace(LATENT, final_alpha_cumprod=1.0), 6, "leading", solver=solver)
    assert grid.alphas_cumprod_prev[-1] == 1


def test_fractional_times_have_interpolated_levels_and_the_scale_of_the_network():
    grid = solver_grid(replace(LATENT, time_scale=0.25), 5, "linspace", solver="euler")
    assert grid.timesteps.tolist() == [999 / 4 * i / 4 for i in (4, 3, 2, 1, 0)]
    sigma = ((1 - LATENT.alphas_cumprod) / LATENT.alphas_cumprod) ** 0.5
    between = 0.75 * sigma[749] + 0.25 * sigma[750]
    assert float(grid.alphas_cumprod[1]) == pytest.approx(float(1 / (1 + between**2)), rel=1e-4)
    assert grid.step_of(grid.network_time(torch.arange(5))).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("offset", [0, 1, 900])
@pytest.mark.parametrize("solver", OTHERS)
def test_leading_times_stay_inside_the_schedule(solver, offset):
    grid = solver_grid(replace(LATENT, steps_offset=offset), 2, "leading", solver=solver)
    assert float(grid.timesteps[0]) <= 999


@pytest.mark.parametrize("solver", OTHERS)
def test_grids_can_be_pickled_and_copied(toy, solver):
    grid = toy.time_grid(6, "leading", solver=solver)
    expected = toy.sample(toy.denoiser, grid, range(3), 0)
    for other in (pickle.loads(pickle.dumps(grid)), copy.deepcopy(grid)):
        assert torch.equal(toy.sample(toy.denoiser, other, range(3), 0), expected)


def test_ddim_is_the_default(toy):
    grid = toy.time_grid(6, "quad", eta=0.5)
    assert grid.solver == "ddim" and grid.make_scheduler is None
    assert torch.equal(grid.timesteps, TimeGrid.from_schedule(toy.schedule, 6, "quad").timesteps)


def test_the_published_eta_is_one_of_ddim(toy):
    model = replace(toy, sampler=replace(toy.sampler, eta=1.0))
    assert model.time_grid(6).eta == 1 and model.time_grid(6, solver="euler").eta == 0


def test_a_start_without_signal_is_logged(digits, caplog):
    digits.time_grid(10, "leading", solver="euler")
    assert caplog.text == ""
    digits.time_grid(10, "trailing", solver="euler")
    assert "starts at alpha_bar=2e-09 and does not clamp x0" in caplog.text


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"solver": "heun"}, "sampler=heun: choose one of ddim, dpm_solver, pndm, euler"),
        ({"spacing": "quad", "solver": "dpm_solver"},
         "sampler.spacing=quad: sampler=dpm_solver takes leading, linspace or trailing"),
        ({"eta": 1.0, "solver": "euler"}, "sampler.eta=1: sampler=euler is deterministic; choose 0, or sampler=ddim"),
        ({"steps": 41, "solver": "pndm"}, r"sampler.steps=41: choose 1\.\.40"),
        ({"steps": 40, "solver": "dpm_solver"}, "sampler.steps=40: sampler=dpm_solver has no 40 different times"),
        ({"steps": 1, "spacing": "linspace", "solver": "euler"}, "sampler.steps=1: .* choose another number of steps"),
        ({"spacing": "linspace", "solver": "pndm"}, r"moves in strides of 40 // 8 = 5 and would miss these times"),
    ],
)
def test_impossible_settings_are_named(toy, settings, message):
    with pytest.raises(ConfigError, match=message):
        toy.time_grid(**{"steps": 8, "spacing": "leading"} | settings)


def test_the_variance_of_a_step_without_noise_cannot_be_corrected(toy):
    with pytest.raises(ConfigError, match="sampler=pndm adds no noise of its own"):
        toy.sample(
            toy.denoiser, toy.time_grid(8, "leading", solver="pndm"), [0], 0, eps_noise_std=torch.zeros(9)
        )
