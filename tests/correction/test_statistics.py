"""Statistics of quantization noise against golden numbers, direct computation, and known distributions."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from ptq_exp.correction import (
    MomentChunks,
    NoiseStatistics,
    fit_moments,
    fit_statistics,
    mean_square_error,
    relative_error,
    sample_moments,
)
from ptq_exp.errors import ConfigError, DataError

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "ptqd_statistics.npz")


def pairs(n=200, channels=2, size=6, steps=3, k=0.1, bias=0.05, std=0.1, seed=0):
    """eps, eps_q with a known slope, channel bias (+-) and residual, and the step of each pair."""
    g = torch.Generator().manual_seed(seed)
    eps = torch.randn(n, channels, size, size, generator=g, dtype=torch.float64)
    sign = torch.tensor([1.0, -1.0] * channels)[:channels].view(1, -1, 1, 1)
    noise = torch.randn(eps.shape, generator=g, dtype=torch.float64)
    return eps, (1 + k) * eps + sign * bias + std * noise, torch.arange(n) % steps


@pytest.mark.parametrize("tag", ["small", "large"])
def test_code_convention_meets_the_golden_numbers(tag):
    eps, error = (torch.from_numpy(GOLDEN[f"{tag}/{key}"]) for key in ("data", "error"))
    step = torch.from_numpy(np.searchsorted(GOLDEN[f"{tag}/stat_t"], GOLDEN[f"{tag}/t"]))
    found = fit_statistics(eps, eps + error, step, 20, convention="code")
    for name, golden in (("k", "k"), ("bias", "bias"), ("residual_std", "resid_std")):
        wanted = torch.from_numpy(GOLDEN[f"{tag}/{golden}"])
        torch.testing.assert_close(getattr(found, name), wanted, rtol=0, atol=1e-6)
    assert torch.equal(found.slope, found.k.clamp(min=0)) and bool((found.k < 0).any())


def test_paper_convention_is_what_a_direct_computation_gives():
    eps, eps_q, step = pairs(k=-0.2, bias=0.3)
    found = fit_statistics(eps, eps_q, step, 3)
    for s in range(3):
        x, e = eps[step == s], (eps_q - eps)[step == s]
        k, intercept = np.polyfit(x.flatten().numpy(), e.flatten().numpy(), 1)
        left = e - k * x
        centred = left - left.mean((0, 2, 3), keepdim=True)
        assert float(found.k[s]) == pytest.approx(k, rel=1e-9)
        torch.testing.assert_close(found.bias[s], left.mean((0, 2, 3)))
        assert float(found.residual_std[s]) == pytest.approx(float(centred.square().mean().sqrt()), rel=1e-9)
        assert float(found.r[s]) == pytest.approx(np.corrcoef(x.flatten(), e.flatten())[0, 1], rel=1e-9)
        kurtosis = float((centred**4).mean() / centred.square().mean() ** 2 - 3)
        assert float(found.kurtosis[s]) == pytest.approx(kurtosis, rel=1e-6)


def test_the_two_conventions_differ_by_what_the_paper_says():
    eps, eps_q, step = pairs(k=0.3)
    eps, eps_q = eps + 2.0, eps_q + 2.0 * 1.3  # a mean of eps that the raw bias mixes up with the slope
    paper, code = (fit_statistics(eps, eps_q, step, 3, convention=c) for c in ("paper", "code"))
    mean = torch.stack([eps[step == s].mean((0, 2, 3)) for s in range(3)])
    torch.testing.assert_close(code.bias - paper.bias, paper.k.view(-1, 1) * mean)
    assert torch.equal(code.k, paper.k)


@pytest.mark.parametrize(("shape", "excess"), [("normal", 0.0), ("uniform", -1.2)])
def test_kurtosis_tells_a_gaussian_residual_from_a_uniform_one(shape, excess):
    g = torch.Generator().manual_seed(1)
    eps = torch.randn(400, 1, 16, 16, generator=g)
    noise = torch.randn(eps.shape, generator=g) if shape == "normal" else torch.rand(eps.shape, generator=g) - 0.5
    found = fit_statistics(eps, 1.05 * eps + 0.1 * noise, torch.zeros(400, dtype=torch.long), 1)
    assert float(found.kurtosis) == pytest.approx(excess, abs=0.05)


def test_standard_errors_count_samples_not_pixels():
    """One offset per sample: its pixels repeat it, so that many more pixels must not make the bias surer."""
    g = torch.Generator().manual_seed(2)
    offsets = torch.randn(64, 1, 1, 1, generator=g).expand(64, 1, 8, 8)
    eps = torch.randn(64, 1, 8, 8, generator=g)
    found = fit_statistics(eps, eps + offsets, torch.zeros(64, dtype=torch.long), 1)
    assert float(found.bias_stderr) == pytest.approx(float(offsets[:, 0, 0, 0].std()) / 8, rel=0.05)


def test_standard_error_of_the_slope_covers_its_scatter():
    """Slopes that vary from sample to sample: over many repetitions the estimates scatter as much as they say."""
    g = torch.Generator().manual_seed(3)
    slopes, said = [], []
    for _ in range(300):
        eps = torch.randn(40, 1, 4, 4, generator=g)
        own = 0.1 + 0.2 * torch.randn(40, 1, 1, 1, generator=g)
        found = fit_statistics(eps, (1 + own) * eps, torch.zeros(40, dtype=torch.long), 1)
        slopes.append(float(found.k))
        said.append(float(found.k_stderr))
    assert np.mean(said) == pytest.approx(np.std(slopes), rel=0.15)


def test_shrinkage_leaves_sure_values_alone_and_removes_noise():
    eps, eps_q, step = pairs(n=600, k=0.2, bias=0.1, std=0.05)
    plain, shrunk = (fit_statistics(eps, eps_q, step, 3, shrink=shrink) for shrink in (False, True))
    torch.testing.assert_close(shrunk.k, plain.k, rtol=1e-3, atol=0)
    torch.testing.assert_close(shrunk.bias, plain.bias, rtol=1e-2, atol=0)
    nothing = pairs(n=60, steps=20, k=0.0, bias=0.0, std=0.5, seed=5)
    plain, shrunk = (fit_statistics(*nothing, 20, shrink=shrink) for shrink in (False, True))
    assert int((shrunk.k == 0).sum()) > 8 and bool((shrunk.k.abs() <= plain.k.abs()).all())
    assert float(shrunk.bias.square().sum()) < 0.5 * float(plain.bias.square().sum())
    assert "k differs from 0 by less than two standard errors" in shrunk.summary()


@pytest.mark.parametrize("k", [-0.4, -0.1, -0.01, 0.0, 0.05, 0.5])
@pytest.mark.parametrize("std", [0.01, 0.3, 1.0])
def test_shrunk_corrections_help_on_held_out_pairs_and_never_harm(k, std):
    """An honest split: fitted on one half, judged on the other. Unshrunk, k = -0.4 and std = 1 is 60 % worse."""
    fitted = pairs(n=300, k=k, bias=0.02, std=std)
    held_out = pairs(n=300, k=k, bias=0.02, std=std, seed=9)
    chunks = [(held_out[2], sample_moments(*held_out[:2]))]
    before = relative_error(chunks, 3)
    after = relative_error(chunks, 3, fit_statistics(*fitted, 3, shrink=True))
    assert float((after / before).max()) < 1.01
    assert float((after / before).mean()) < 1.0 + 1e-3 * std


def test_an_unshrunk_negative_slope_amplifies_the_residual():
    fitted, held_out = pairs(n=300, k=-0.4, std=1.0), pairs(n=300, k=-0.4, std=1.0, seed=9)
    chunks = [(held_out[2], sample_moments(*held_out[:2]))]
    assert float((relative_error(chunks, 3, fit_statistics(*fitted, 3)) / relative_error(chunks, 3)).min()) > 1.3


def test_errors_in_closed_form_equal_those_of_corrected_estimates():
    eps, eps_q, step = pairs(k=-0.2, bias=0.3, std=0.4)
    statistics = fit_statistics(eps, eps_q, step, 3)
    chunks = [(step, sample_moments(eps, eps_q))]
    gain = 1 / (1 + statistics.slope[step].view(-1, 1, 1, 1))
    corrected = (eps_q - statistics.bias[step].view(len(step), -1, 1, 1)) * gain
    for found, estimate in ((None, eps_q), (statistics, corrected)):
        squares = torch.stack([(estimate - eps)[step == s].square().mean() for s in range(3)])
        power = torch.stack([eps[step == s].square().mean() for s in range(3)])
        torch.testing.assert_close(mean_square_error(chunks, 3, found), squares)
        torch.testing.assert_close(relative_error(chunks, 3, found), (squares / power).sqrt())


def test_toggles_leave_the_other_part_in_the_error():
    eps, eps_q, step = pairs(k=0.3, bias=0.2)
    chunks = [(step, sample_moments(eps + 1, eps_q + 1))]
    bias_alone = fit_moments(chunks, 3, 36, correlation=False)
    assert bool((bias_alone.k == 0).all())
    torch.testing.assert_close(bias_alone.bias[0], (eps_q - eps)[step == 0].mean((0, 2, 3)))
    slope_alone = fit_moments(chunks, 3, 36, bias=False)
    assert bool((slope_alone.bias == 0).all())
    assert torch.equal(slope_alone.k, fit_moments(chunks, 3, 36).k)
    assert bool((bias_alone.residual_std > slope_alone.residual_std * 2).all())


def test_repeated_times_are_fitted_together():
    eps, eps_q, step = pairs(n=120, steps=4)
    repeats = torch.tensor([0, 1, 2, 2])
    chunks = [(step, sample_moments(eps, eps_q))]
    found = fit_moments(chunks, 4, 36, repeats=repeats)
    together = fit_statistics(eps, eps_q, repeats[step], 3)
    assert torch.equal(found.k, together.k[[0, 1, 2, 2]]) and torch.equal(found.bias[3], together.bias[2])


def test_the_order_and_the_size_of_chunks_do_not_matter():
    eps, eps_q, step = pairs(n=210)
    moments = sample_moments(eps, eps_q)
    whole = fit_moments([(step, moments)], 3, 36, shrink=True)
    order = torch.randperm(210, generator=torch.Generator().manual_seed(0))
    parts = fit_moments([(step[rows], moments[rows]) for rows in order.split(17)], 3, 36, shrink=True)
    for name in ("k", "bias", "residual_std", "r", "kurtosis", "k_stderr", "bias_stderr"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-9, atol=1e-12)


def test_memory_does_not_grow_with_the_number_of_samples():
    class Endless:
        def __init__(self, n):
            self.n = n

        def __iter__(self):
            for i in range(self.n):
                g = torch.Generator().manual_seed(i)
                eps = torch.randn(32, 1, 4, 4, generator=g)
                yield torch.arange(32) % 4, sample_moments(eps, 1.1 * eps + torch.randn(eps.shape, generator=g))

    peaks = []
    for n in (20, 200):
        tracemalloc.start()
        fit_moments(Endless(n), 4, 16, convention="code")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + 50_000


def test_moments_of_widths_are_chosen_step_by_step():
    moments = np.zeros((5, 2, 3, 1, 15))
    moments[:, 0], moments[:, 1] = 1.0, 2.0
    found = list(MomentChunks(moments, torch.tensor([1, 0, 1])))
    (step, rows), = found
    assert rows[:, 0, 0].reshape(5, 3)[0].tolist() == [2.0, 1.0, 2.0] and step.tolist() == [0, 1, 2] * 5


def test_statistics_survive_saving(tmp_path):
    statistics = fit_statistics(*pairs(), 3, shrink=True)
    statistics.save(tmp_path / "s.npz")
    loaded = NoiseStatistics.load(tmp_path / "s.npz")
    assert torch.equal(loaded.bias, statistics.bias) and loaded.convention == "paper" and loaded.made_for is None
    np.savez(tmp_path / "other.npz", arr_0=np.zeros(3))
    with pytest.raises(DataError, match="holds no noise statistics: k, bias"):
        NoiseStatistics.load(tmp_path / "other.npz")


def test_mistakes_are_named():
    eps, eps_q, step = pairs()
    with pytest.raises(DataError, match=r"no noise estimates for the steps \[3\] of 4"):
        fit_statistics(eps, eps_q, step, 4)
    with pytest.raises(DataError, match="but the grid has the steps 0 to 1"):
        fit_statistics(eps, eps_q, step, 2)
    with pytest.raises(ConfigError, match="correction.convention=theirs: choose one of paper, code"):
        fit_statistics(eps, eps_q, step, 3, convention="theirs")
    with pytest.raises(DataError, match="of one shape"):
        fit_statistics(eps, eps_q[:, :1], step, 3)
    with pytest.raises(DataError, match="one position for each of 200"):
        fit_statistics(eps, eps_q, step[:5], 3)
    eps_q[0, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="NaN or infinity"):
        fit_statistics(eps, eps_q, step, 3)


def test_a_single_sample_and_a_constant_estimate_give_no_correction_when_shrunk():
    eps, eps_q, _ = pairs(n=1)
    one = fit_statistics(eps, eps_q, torch.zeros(1, dtype=torch.long), 1, shrink=True)
    assert float(one.k) == 0 and bool((one.bias == 0).all())
    flat = fit_statistics(torch.zeros(9, 1, 2, 2), torch.ones(9, 1, 2, 2), torch.zeros(9, dtype=torch.long), 1)
    assert float(flat.k) == 0 and float(flat.bias) == 1 and float(flat.residual_std) == 0
