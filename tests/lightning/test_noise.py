"""Sums of errors over samples: those of a plain loop, whatever the batches, also behind an interruption."""

import numpy as np
import pytest
import torch
from torch import nn

from ptq_exp.correction import MomentChunks, fit_moments, fixed_pattern_share
from ptq_exp.diffusion.noise import EVALUATION
from ptq_exp.diffusion.paired import paired_estimates
from ptq_exp.lightning import NoiseModule, measure

N, STEPS, SEED = 5, 3, 2


class Off(nn.Module):
    """`inner` with an error that depends on the state, and one that does not."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, t, **conditions):
        pattern = torch.linspace(-0.1, 0.2, 16).view(1, 1, 4, 4)
        return self.inner(x, t, **conditions) + 0.05 * torch.sin(5 * x) + pattern


def module_of(toy, grid, denoiser=None, **options):
    quantized = [denoiser or Off(toy.denoiser)]
    return NoiseModule(toy, toy.denoiser, quantized, grid, seed=SEED, stream=EVALUATION, **options)


def measured(toy, grid, trainer, folder, batch, **options):
    return measure(module_of(toy, grid, **options), trainer, N, batch, folder)


def pairs(toy, grid):
    """eps and eps_q [N, S, C, H, W] of all samples at once."""
    found = []
    paired_estimates(
        toy, toy.denoiser, [Off(toy.denoiser)], grid, range(N), SEED,
        lambda step, eps, others: found.append((eps, *others)),
    )
    return [torch.stack(kind, 1).double() for kind in zip(*found, strict=True)]


@pytest.mark.parametrize("batch", [1, 2, 5, 8])  # 5 samples: the last batch of 2 and that of 8 have more than there are
def test_sums_and_shares_do_not_depend_on_the_batches(toy, trainer, tmp_path, batch):
    grid = toy.time_grid(STEPS)
    eps, eps_q = pairs(toy, grid)
    error = eps_q - eps
    found = measured(toy, grid, trainer, tmp_path, batch, summed=N)
    assert set(found) == {"moments", "error_sum"}
    np.testing.assert_allclose(found["error_sum"], error.sum(0), rtol=1e-6, atol=1e-7)
    total = torch.from_numpy(np.array(found["error_sum"]))
    share = fixed_pattern_share(total, N, MomentChunks(found["moments"]), STEPS)
    expected = error.mean(0).square().sum((1, 2, 3)) / error.square().sum((2, 3, 4)).mean(0)
    np.testing.assert_allclose(share, expected.sqrt(), rtol=1e-6)
    assert 0.4 < float(share.min()) and float(share.max()) < 1


def test_with_statistics_the_estimates_are_summed_too(toy, trainer, tmp_path):
    grid = toy.time_grid(STEPS)
    first = measured(toy, grid, trainer, tmp_path / "first", 2)
    assert set(first) == {"moments"}
    statistics = fit_moments(MomentChunks(first["moments"]), STEPS, 16)
    found = measured(toy, grid, trainer, tmp_path / "second", 2, statistics=statistics, summed=N)
    np.testing.assert_allclose(found["eps_sum"], pairs(toy, grid)[0].sum(0), rtol=1e-6, atol=1e-6)


def test_an_interrupted_measurement_goes_on_and_counts_every_sample_once(toy, trainer, tmp_path, counting):
    grid = toy.time_grid(STEPS)
    whole = measured(toy, grid, trainer, tmp_path / "whole", 2, summed=N)

    def fail():
        raise KeyboardInterrupt

    failing = module_of(toy, grid, counting(Off(toy.denoiser), fails_at=STEPS + 2, fail=fail), summed=N)
    folder = tmp_path / "parts"
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        measure(failing, trainer, N, 2, folder)
    assert len(list(folder.glob("*.npz"))) == 1
    again = measured(toy, grid, trainer, folder, 2, summed=N)
    assert all(np.array_equal(again[name], whole[name]) for name in ("moments", "error_sum"))
