"""Time-step distributions: moments in closed form, the published histogram, and the direction of time.

golden/timesteps_normal.npz: histogram over T = 250 of the normal distribution as PTQ4DM's release draws it,
from the normal CDF.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq_exp.calibration import Constant, Normal, SkewNormal, Uniform, positions
from ptq_exp.errors import ConfigError

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "timesteps_normal.npz")


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("mean, std", [(0.4, 0.4), (0.5, 0.35)])
def test_normal_has_the_published_histogram(mean, std):
    key, n = f"m{mean}_s{std}", 2_000_000
    drawn = Normal(mean, std).draw(n, 250, rng())
    share = np.bincount(drawn, minlength=250) / n
    assert share.shape == (250,)
    # the expected total variation of 2e6 draws from 250 bins is 0.004
    assert np.abs(share - GOLDEN[f"{key}/analytic_hist"]).sum() / 2 < 0.006
    assert drawn.mean() == pytest.approx(float(GOLDEN[f"{key}/analytic_mean"]), abs=0.25)
    # the first and the last bin hold the clamped tails beside their own share
    own = np.array([share[1], share[-2]])
    clamped = np.array([GOLDEN[f"{key}/analytic_clamped_low"], GOLDEN[f"{key}/analytic_clamped_high"]])
    np.testing.assert_allclose(np.array([share[0], share[-1]]), clamped + own, atol=1.5e-3)


@pytest.mark.parametrize(
    "fraction, index", [(-3.0, 0), (-0.001, 0), (0.0199, 1), (0.0201, 2), (0.9999, 99), (1.7, 99)]
)
def test_fractions_are_cut_towards_zero_and_clamped(fraction, index):
    assert set(Normal(fraction, 1e-9).draw(8, 100, rng())) == {index}


def test_a_repeated_draw_is_the_same_and_seeds_differ():
    for distribution in (Normal(), SkewNormal(), Uniform()):
        first = positions(distribution, 64, 50, seed=3)
        assert first.dtype == torch.int64 and first.shape == (64,)
        assert torch.equal(first, positions(distribution, 64, 50, seed=3))
        assert not torch.equal(first, positions(distribution, 64, 50, seed=4))


@pytest.mark.parametrize("shape", [-3.0, 0.0, 2.0, 8.0])
def test_skew_normal_has_the_moments_it_is_asked_for(shape):
    """So fine a grid and so small a std that neither truncation nor clamping matters."""
    t = SkewNormal(0.5, 0.02, shape).draw(400_000, 10**7, rng()) / 10**7
    delta = shape / math.sqrt(1 + shape**2)
    # O'Hagan and Leonard's closed form of the third standardised moment
    skewness = (4 - math.pi) / 2 * (delta * math.sqrt(2 / math.pi)) ** 3 / (1 - 2 * delta**2 / math.pi) ** 1.5
    assert t.mean() == pytest.approx(0.5, abs=2e-4)
    assert t.std() == pytest.approx(0.02, rel=0.01)
    assert ((t - t.mean()) ** 3).mean() / t.std() ** 3 == pytest.approx(skewness, abs=0.03)
    if shape:
        assert np.sign(t.mean() - np.median(t)) == np.sign(shape)


def test_skew_normal_without_skew_is_the_normal():
    skewed = np.bincount(SkewNormal(0.4, 0.4, 0.0).draw(400_000, 50, rng()), minlength=50)
    normal = np.bincount(Normal(0.4, 0.4).draw(400_000, 50, rng(1)), minlength=50)
    assert np.abs(skewed - normal).sum() / 2 / 400_000 < 0.01


@pytest.mark.parametrize("mean", [0.51, -0.01, float("nan")])
def test_a_centre_beyond_half_of_the_time_axis_is_not_ndtc(mean):
    with pytest.raises(ConfigError, match=r"calibration\.distribution\.mean=.*0\.\.0\.5"):
        SkewNormal(mean=mean)
    SkewNormal(mean=0.0), SkewNormal(mean=0.5)


@pytest.mark.parametrize("std", [0.0, -0.1, float("nan")])
@pytest.mark.parametrize("distribution", [Normal, SkewNormal])
def test_a_spread_of_zero_is_refused(distribution, std):
    with pytest.raises(ConfigError, match=r"calibration\.distribution\.std="):
        distribution(std=std)


@given(st.integers(1, 300), st.integers(1, 60), st.integers(0, 5))
def test_uniform_visits_every_step_equally_often(n, n_steps, seed):
    drawn = Uniform().draw(n, n_steps, rng(seed))
    counts = np.bincount(drawn, minlength=n_steps)
    assert len(drawn) == n and len(counts) == n_steps and drawn.dtype == np.int64
    assert counts.max() - counts.min() <= 1


def test_uniform_is_shuffled():
    """Each half of the samples sees the whole time axis; of an ordered set it would see one half."""
    drawn = Uniform().draw(1024, 250, rng())
    assert not np.array_equal(drawn, np.sort(drawn))
    assert abs(drawn[:512].mean() - drawn[512:].mean()) < 20
    assert abs(np.corrcoef(drawn, np.arange(1024))[0, 1]) < 0.15


@pytest.mark.parametrize(
    "step, position", [("first", 0), ("last", 19), ("middle", 10), (0, 0), (7, 7), (19, 19)]
)
def test_constant_counts_as_sampling_runs(step, position):
    assert positions(Constant(step), 5, 20, seed=0).tolist() == [position] * 5


def test_constant_names_the_valid_steps():
    with pytest.raises(ConfigError, match="step=frist: choose first, middle, last or the number"):
        Constant("frist")
    for step in (-1, 20):
        with pytest.raises(ConfigError, match=rf"step={step}: choose 0\.\.19 \(sampler\.steps\)"):
            positions(Constant(step), 4, 20, seed=0)


def test_positions_count_from_the_noise_and_distributions_from_the_image():
    assert set(positions(Normal(0.035, 1e-9), 9, 100, seed=0).tolist()) == {96}
    near_the_image = positions(SkewNormal(0.1, 0.05), 2000, 100, seed=0).float()
    assert float(near_the_image.mean()) == pytest.approx(89.4, abs=1)
