"""Which steps share a row of the activation ranges."""

import pytest
import torch

from ptq_exp.calibration import check_bins, time_bins
from ptq_exp.diffusion import NoiseSchedule, TimeGrid
from ptq_exp.errors import ConfigError, DataError


def grid(steps, spacing="leading"):
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    return TimeGrid.from_schedule(NoiseSchedule((1 - betas).cumprod(0)), steps, spacing)


@pytest.mark.parametrize(
    ("temporal", "n", "expected"),
    [("static", 9, [0] * 7), ("per_step", 1, [*range(7)]), ("binned", 3, [0, 0, 0, 1, 1, 2, 2]),
     ("binned", 1, [0] * 7), ("binned", 7, [*range(7)])],
)
def test_bins_are_consecutive_and_as_equal_as_can_be(temporal, n, expected):
    assert time_bins(grid(7), temporal, n).tolist() == expected


def test_steps_of_one_time_share_a_bin_and_no_number_is_left_out():
    quad = grid(100, "quad")
    assert len(quad.timesteps.unique()) < 100
    bins = time_bins(quad, "per_step")
    assert bins.max() + 1 == len(bins.unique()) == len(quad.timesteps.unique())
    for time in quad.timesteps.unique():
        assert len(bins[quad.timesteps == time].unique()) == 1


def test_impossible_bins_name_the_setting():
    for n in (0, 8):
        with pytest.raises(ConfigError, match=rf"temporal_bins={n}: choose 1\.\.7"):
            time_bins(grid(7), "binned", n)
    with pytest.raises(ConfigError, match="temporal=often: choose one of static, binned, per_step"):
        time_bins(grid(7), "often")


def test_an_empty_bin_says_what_to_do():
    bins = time_bins(grid(7), "per_step")
    check_bins(bins, torch.arange(7))
    with pytest.raises(DataError, match=r"2 of 7 bins.*first: step 2.*calibration=uniform.*calibration.n_samples=5"):
        check_bins(bins, torch.tensor([0, 1, 3, 4, 6]))
