"""The grid's times, noise levels and their pairing, against exact arithmetic and values by hand."""

import pickle
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from ptq_exp.diffusion import NoiseSchedule, TimeGrid
from ptq_exp.errors import ConfigError


def schedule(total):
    """A decreasing schedule whose level tells its time: alphas_cumprod[t] = 1 - (t + 1) / (T + 1)."""
    return NoiseSchedule(1 - torch.arange(1, total + 1, dtype=torch.float64) / (total + 1))


def test_four_of_ten_steps_by_hand():
    grid = TimeGrid.from_schedule(schedule(10), 4)
    assert len(grid) == 4
    assert grid.timesteps.tolist() == [9, 6, 3, 0]
    expected = torch.tensor([1, 4, 7, 10], dtype=torch.float64) / 11
    torch.testing.assert_close(grid.alphas_cumprod, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(grid.alphas_cumprod_prev[:3], expected[1:], rtol=1e-12, atol=0)
    assert grid.alphas_cumprod_prev[3] == 1
    ldm = TimeGrid.from_schedule(replace(schedule(10), final_alpha_cumprod=0.99), 4)
    assert ldm.alphas_cumprod_prev[3] == 0.99


def test_one_step_starts_from_the_noisiest_level():
    grid = TimeGrid.from_schedule(schedule(10), 1)
    assert grid.timesteps.tolist() == [9] and grid.alphas_cumprod_prev.tolist() == [1]


@given(st.integers(1, 4000).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, min(total, 300)))))
def test_times_are_the_rounded_even_spacing_and_levels_follow_them(total_and_steps):
    total, steps = total_and_steps
    levels = schedule(total)
    grid = TimeGrid.from_schedule(levels, steps)
    # exact rational arithmetic, halves to even
    exact = [round(Fraction((total - 1) * i, max(steps - 1, 1))) for i in range(steps)][::-1]
    assert grid.timesteps.tolist() == (exact if steps > 1 else [total - 1])
    assert torch.equal(grid.alphas_cumprod, levels.alphas_cumprod[grid.timesteps.long()])
    assert torch.equal(grid.alphas_cumprod_prev[:-1], grid.alphas_cumprod[1:])
    assert grid.alphas_cumprod_prev[-1] == 1
    assert (grid.alphas_cumprod_prev > grid.alphas_cumprod).all()


@pytest.mark.parametrize("steps", [27, 53, 1000 - 1])
def test_times_halfway_between_two_integers_round_to_even(steps):
    """13 * 999 / 26 = 499.5 and the like, where repeated addition of the stride falls short of the half."""
    exact = [round(Fraction(999 * i, steps - 1)) for i in range(steps)][::-1]
    assert TimeGrid.from_schedule(schedule(1000), steps).timesteps.tolist() == exact


@pytest.mark.parametrize("steps, first, stride", [(20, 951, 50), (50, 981, 20), (200, 996, 5), (250, 997, 4)])
def test_leading_times_are_those_of_latent_diffusion(steps, first, stride):
    """1, 51, ..., 951 for 20 steps: both the index into the schedule and the time that is fed."""
    levels = schedule(1000)
    grid = TimeGrid.from_schedule(levels, steps, "leading")
    assert grid.timesteps.tolist() == list(range(first, 0, -stride)) and grid.timesteps[-1] == 1
    assert torch.equal(grid.alphas_cumprod, levels.alphas_cumprod[grid.timesteps.long()])
    assert torch.equal(grid.alphas_cumprod_prev[:-1], grid.alphas_cumprod[1:])
    assert grid.alphas_cumprod_prev[-1] == 1


@given(st.integers(1, 1000).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, total))))
def test_leading_times_are_as_many_as_asked_for_and_lie_in_the_schedule(total_and_steps):
    total, steps = total_and_steps
    times = TimeGrid.from_schedule(schedule(total), steps, "leading").timesteps
    assert len(times) == steps and set((-times.diff()).tolist()) <= {total // steps}
    assert times[-1] in (0, 1) and times[0] <= total - 1
    # one step earlier only where the last time would not fit
    assert times[-1] == 1 or times[0] == total - 1


def test_an_unknown_spacing_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"sampler\.spacing=karras: choose one of leading, linspace, quad, trailing"):
        TimeGrid.from_schedule(schedule(10), 4, "karras")


@pytest.mark.parametrize("steps", [0, -3, 11])
def test_impossible_numbers_of_steps_name_the_setting_and_the_limits(steps):
    with pytest.raises(ConfigError, match=rf"sampler\.steps={steps}: choose 1\.\.10"):
        TimeGrid.from_schedule(schedule(10), steps)


def test_network_time_is_float32_and_may_be_fractional():
    grid = TimeGrid.from_schedule(replace(schedule(10), time_scale=0.25), 4)
    one = grid.network_time(1, 3)
    assert one.dtype == torch.float32 and one.tolist() == [1.5, 1.5, 1.5]
    assert grid.network_time(0).tolist() == [2.25]
    many = grid.network_time(torch.tensor([3, 0, 0, 2]))
    assert many.dtype == torch.float32 and many.tolist() == [0, 2.25, 2.25, 0.75]


def test_leading_spacing_is_that_of_latent_diffusion():
    grid = TimeGrid.from_schedule(schedule(1000), 20, "leading")
    assert grid.timesteps.tolist() == list(range(951, 0, -50))
    assert TimeGrid.from_schedule(schedule(1000), 1000, "leading").timesteps.tolist() == list(range(999, -1, -1))
    assert TimeGrid.from_schedule(schedule(10), 3, "leading").timesteps.tolist() == [7, 4, 1]


@pytest.mark.parametrize("steps", [1, 3, 7, 20, 50, 250, 1000])
def test_trailing_times_are_those_of_diffusers(steps):
    scheduler = DDIMScheduler(1000, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    grid = TimeGrid.from_schedule(schedule(1000), steps, "trailing")
    assert grid.timesteps.tolist() == scheduler.timesteps.tolist() and grid.timesteps[0] == 999


def test_positions_of_network_times():
    grid = TimeGrid.from_schedule(replace(schedule(4000), time_scale=0.25), 300)
    steps = torch.tensor([299, 0, 17, 17, 150])
    assert bool((grid.timesteps % 1 != 0).any())
    found = grid.step_of(grid.network_time(steps))
    assert found.dtype == torch.int64 and torch.equal(found, steps)
    assert torch.equal(grid.first_with_time, torch.arange(300))
    assert grid.step_of(torch.empty(0)).shape == (0,)


def test_times_whose_float32_is_rounded_are_found():
    grid = TimeGrid.from_schedule(replace(schedule(4000), time_scale=1 / 3), 4000)
    assert not torch.equal(grid.timesteps.float().double(), grid.timesteps)
    assert torch.equal(grid.step_of(grid.network_time(torch.arange(4000))), torch.arange(4000))


def test_repeated_times_have_the_position_of_the_first():
    grid = TimeGrid.from_schedule(schedule(1000), 100, "quad")
    times = grid.timesteps.tolist()
    assert times[-5:] == [1, 0, 0, 0, 0]  # (i sqrt(800) / 99)^2 = 0, 0.08, 0.33, 0.73, 1.31
    first = [times.index(time) for time in times]
    assert grid.first_with_time.tolist() == first and grid.first_with_time.dtype == torch.int64
    assert grid.first_with_time is grid.first_with_time
    assert grid.step_of(grid.network_time(torch.tensor([99, 97, 3]))).tolist() == [96, 96, 3]


@pytest.mark.parametrize("time, shown", [(500.5, "500.5"), (-1.0, "-1"), (float("nan"), "nan")])
def test_a_time_of_another_grid_names_itself_and_the_grid(time, shown):
    grid = TimeGrid.from_schedule(schedule(1000), 20, "leading")
    message = rf"the network time {shown} is not on the grid of 20 steps from 951 to 1: .* belong to another grid"
    with pytest.raises(ConfigError, match=message):
        grid.step_of(torch.tensor([951.0, time, 1.0]))


def test_a_grid_whose_positions_were_asked_for_can_still_be_pickled():
    grid = TimeGrid.from_schedule(schedule(10), 4)
    first = grid.first_with_time
    again = pickle.loads(pickle.dumps(grid))
    assert torch.equal(again.first_with_time, first) and torch.equal(again.timesteps, grid.timesteps)
