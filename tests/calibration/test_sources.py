"""Where states come from: how they pair with times, what they cost, and the statistics of diffused images."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ptq_exp.calibration import SOURCES, CalibrationSet, StateRequest, source
from ptq_exp.diffusion import SOLVERS, SampleNoise, sample
from ptq_exp.diffusion.noise import CALIBRATION
from ptq_exp.embedded import digits_model
from ptq_exp.errors import ConfigError, DataError
from ptq_exp.evaluation.images import from_uint8


def trajectory(model, grid, indices, seed):
    """All records of the full-precision run on the calibration noise."""
    records = []
    noise = SampleNoise(seed, indices, model.sample_shape, stream=CALIBRATION)
    sample(model.denoiser, grid, noise, clip_sample=model.clip_sample, on_step=records.append)
    return records


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_eps_of_the_calibration_set_is_the_eps_of_the_trajectory(eta):
    """The published code counts labels in reverse: states of step s came with the time of step S - 1 - s."""
    model, seed, indices = digits_model(), 5, list(range(12))
    # not the last step: the network multiplies a rounding error of a clean image by 1 / sqrt(1 - alpha_bar), 100 times
    grid = model.time_grid(8, eta=eta)
    steps = torch.tensor([0, 1, 2, 3, 4, 5, 6, 5, 3, 2, 1, 0])
    x, evaluations = source("denoise")(model, StateRequest(grid, indices, steps, seed))
    made = CalibrationSet(x.numpy(), steps.numpy(), grid.network_time(steps).numpy(), evaluations.numpy())

    records = trajectory(model, grid, indices, seed)
    expected = torch.stack([records[s].eps[i] for i, s in enumerate(steps.tolist())])
    with torch.no_grad():
        found = torch.cat([call.evaluate(model.denoiser) for call in made.batches(5)])
        wrong = [model.denoiser(x, grid.network_time(s)) for s in (len(grid) - 1 - steps, steps + 1)]
    assert float((found - expected).abs().max()) < 1e-5
    # each sample would notice the reversed label, and the label of the next step
    for eps in wrong:
        assert float((eps - expected).abs().amax(dim=(1, 2, 3)).min()) > 1e-2


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_states_are_those_that_enter_the_step(toy, eta):
    grid, indices = toy.time_grid(9, eta=eta), [3, 1, 4, 15, 9, 2, 6]
    steps = torch.tensor([8, 0, 3, 3, 7, 0, 5])
    x, _ = source("denoise")(toy, StateRequest(grid, indices, steps, seed=2))
    records = trajectory(toy, grid, indices, 2)
    for i, step in enumerate(steps.tolist()):
        assert torch.equal(x[i], records[step].x[i]), (i, step)


def test_trajectories_leave_the_batch_when_they_arrive(toy):
    steps = torch.tensor([4, 0, 2, 2, 0, 5])
    _, evaluations = source("denoise")(toy, StateRequest(toy.time_grid(9), range(6), steps, seed=0))
    assert toy.denoiser.batches == [4, 4, 2, 2, 1]
    assert evaluations.tolist() == steps.tolist()


def test_guided_trajectories_follow_their_labels_and_cost_both_halves(toy):
    model = replace(toy, n_classes=4, null_label=7)
    guided, steps = model.guided(model.denoiser, 2.0), torch.tensor([4, 0, 2])
    x, evaluations = source("denoise")(model, StateRequest(model.time_grid(9), range(3), steps, 0, denoiser=guided))
    assert evaluations.tolist() == [8, 0, 4]
    conditions = model.draw_conditions(range(3), 0, CALIBRATION)
    noise = SampleNoise(0, range(3), model.sample_shape, stream=CALIBRATION)
    records = []
    sample(guided, model.time_grid(9), noise, conditions=conditions, on_step=records.append)
    for i, step in enumerate(steps.tolist()):
        torch.testing.assert_close(x[i], records[step].x[i])


@pytest.mark.parametrize("solver", SOLVERS[1:])
def test_states_of_a_solver_are_those_that_enter_the_step_and_all_pay_for_the_last(toy, solver):
    """Its scheduler keeps the estimates of the batch, so that no trajectory can leave."""
    grid, indices = toy.time_grid(9, "leading", solver=solver), [3, 1, 4, 15, 9]
    steps = torch.tensor([7, 0, 3, 3, 5])
    request = StateRequest(grid, indices, steps, seed=2)
    x, evaluations = source("denoise")(toy, request)
    assert toy.denoiser.batches == [5] * 7 and evaluations.tolist() == [7] * 5
    records = trajectory(toy, grid, indices, 2)
    for i, step in enumerate(steps.tolist()):
        assert torch.equal(x[i], records[step].x[i]), (i, step)
    part, _ = source("denoise")(toy, StateRequest(grid, [15, 1], steps[[3, 1]], seed=2))
    assert torch.equal(part, x[[3, 1]])


def test_guided_trajectories_of_a_solver_follow_their_labels(toy):
    model = replace(toy, n_classes=4, null_label=7)
    guided, grid = model.guided(model.denoiser, 2.0), model.time_grid(9, "leading", solver="euler")
    steps = torch.tensor([4, 0, 2])
    x, evaluations = source("denoise")(model, StateRequest(grid, range(3), steps, 0, denoiser=guided))
    assert evaluations.tolist() == [8, 8, 8]
    records = []
    noise = SampleNoise(0, range(3), model.sample_shape, stream=CALIBRATION)
    sample(guided, grid, noise, conditions=model.draw_conditions(range(3), 0, CALIBRATION), on_step=records.append)
    for i, step in enumerate(steps.tolist()):
        assert torch.equal(x[i], records[step].x[i])


@pytest.mark.parametrize("solver", SOLVERS[1:])
def test_pure_noise_of_a_solver_costs_nothing(toy, solver):
    grid, steps = toy.time_grid(9, "leading", solver=solver), torch.zeros(3, dtype=torch.long)
    request = StateRequest(grid, range(3), steps, seed=0)
    x, evaluations = source("denoise")(toy, request)
    assert int(evaluations.sum()) == 0 and toy.denoiser.batches == []
    torch.testing.assert_close(x, request.noise(toy.sample_shape).draw())


def test_pure_noise_costs_nothing(toy):
    request = StateRequest(toy.time_grid(9), range(3), torch.zeros(3, dtype=torch.long), seed=0)
    x, evaluations = source("denoise")(toy, request)
    assert int(evaluations.sum()) == 0 and toy.denoiser.batches == []
    assert torch.equal(x, request.noise(toy.sample_shape).draw())


@pytest.mark.parametrize("name", list(SOURCES))
def test_a_state_depends_on_seed_index_and_step_alone(toy, name):
    images = np.arange(5 * 16, dtype=np.uint8).reshape(5, 4, 4, 1)
    steps, grid = torch.tensor([5, 0, 2, 8, 3]), toy.time_grid(9, eta=0.5)
    together, _ = source(name)(toy, StateRequest(grid, range(5), steps, 1, images=images))
    for chosen in ([3], [4, 2], [1, 0, 4]):
        part, _ = source(name)(toy, StateRequest(grid, chosen, steps[chosen], 1, images=images))
        assert torch.equal(part, together[chosen])
    assert together.shape == (5, 1, 4, 4) and together.dtype == torch.float32
    other, _ = source(name)(toy, StateRequest(grid, range(5), steps, 2, images=images))
    assert not torch.equal(other, together)


@pytest.mark.parametrize("step", [0, 4, 8])
def test_diffused_images_have_the_moments_of_the_forward_process(toy, step):
    """q(x_t | x_0) = N(sqrt(alpha_bar) x_0, 1 - alpha_bar), Ho et al. 2020, eq. 4."""
    grid, n = toy.time_grid(9), 6000
    level = float(grid.alphas_cumprod[step])
    levels = np.arange(0, 256, 17, dtype=np.uint8).reshape(1, 4, 4, 1)
    images = from_uint8(levels)
    request = StateRequest(grid, range(n), torch.full((n,), step), seed=0, images=levels)
    x, evaluations = source("diffuse")(toy, request)
    assert int(evaluations.sum()) == 0 and toy.denoiser.batches == []
    deviation = x - level**0.5 * images
    # 96,000 values: the standard errors are 0.0032 and 0.0046 of the noise's
    assert abs(float(deviation.mean())) < 0.015 * (1 - level) ** 0.5
    assert float(deviation.var()) == pytest.approx(1 - level, rel=0.025)
    assert float(x.mean(0).sub(level**0.5 * images[0]).abs().max()) < 0.06 * (1 - level) ** 0.5


def test_diffused_samples_of_one_batch_have_the_level_of_their_own_step(toy):
    grid, steps = toy.time_grid(9), torch.tensor([8, 0, 4])
    images = np.full((1, 4, 4, 1), 191, np.uint8)  # 191 / 127.5 - 1 = 0.498
    request = StateRequest(grid, range(3), steps, seed=0, images=images)
    x, _ = source("diffuse")(toy, request)
    level = grid.alphas_cumprod[steps].view(3, 1, 1, 1).float()
    z = request.noise((1, 4, 4)).draw()
    torch.testing.assert_close(x, level.sqrt() * (191 / 127.5 - 1) + (1 - level).sqrt() * z)


def test_raw_states_are_real_images_evenly_chosen(toy):
    images = np.arange(8, dtype=np.uint8).reshape(8, 1, 1, 1).repeat(4, 1).repeat(4, 2)
    steps = torch.zeros(800, dtype=torch.long)
    x, evaluations = source("raw")(toy, StateRequest(toy.time_grid(9), range(800), steps, 0, images=images))
    chosen = ((x[:, 0, 0, 0] + 1) * 127.5).round().long()
    assert int(evaluations.sum()) == 0 and torch.equal(x, from_uint8(images[chosen]))
    counts = torch.bincount(chosen, minlength=8)
    # 100 each: a standard deviation of 9.4
    assert len(counts) == 8 and int(counts.min()) > 55 and int(counts.max()) < 145


def test_noise_is_standard_normal_and_not_that_of_a_scored_image(toy):
    steps = torch.zeros(3000, dtype=torch.long)
    x, evaluations = source("noise")(toy, StateRequest(toy.time_grid(9), range(3000), steps, seed=0))
    assert int(evaluations.sum()) == 0
    assert abs(float(x.mean())) < 0.03 and float(x.var()) == pytest.approx(1, abs=0.05)
    scored = SampleNoise(0, range(3000), toy.sample_shape).draw()
    assert abs(float(torch.corrcoef(torch.stack([x.flatten(), scored.flatten()]))[0, 1])) < 0.03


@pytest.mark.parametrize("name", ["raw", "diffuse"])
def test_sources_that_need_real_images_say_so(toy, name):
    with pytest.raises(DataError, match=r"calibration\.source=raw and =diffuse need real images"):
        source(name)(toy, StateRequest(toy.time_grid(9), range(2), torch.tensor([0, 1]), seed=0))


def test_an_unknown_source_lists_the_known_ones():
    with pytest.raises(ConfigError, match="source=denoised: choose one of denoise, diffuse, raw, noise"):
        source("denoised")
