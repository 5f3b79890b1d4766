"""`DiffusionModel`: images of one sample agree whatever the batch, and copies are independent."""

import pytest
import torch

from ptq_exp.diffusion import UNetDenoiser, relative_eps_error
from ptq_exp.embedded import digits_model
from ptq_exp.errors import ConfigError


@pytest.fixture(scope="module")
def digits():
    return digits_model()


@pytest.fixture(scope="module")
def images_of_64(digits):
    """64 samples in one batch, four steps: over many, single samples lie where the network is steep (4e-5)."""
    return digits.sample(digits.denoiser, digits.time_grid(4), range(64), 3)


@pytest.mark.parametrize("batch_size, n", [(1, 8), (7, 35)])
def test_full_precision_images_agree_across_batch_sizes(digits, images_of_64, batch_size, n):
    """Rounding must not grow: no step may multiply a difference of 1e-6 by more than it shrinks later."""
    grid = digits.time_grid(4)
    batches = torch.arange(n).split(batch_size)
    images = torch.cat([digits.sample(digits.denoiser, grid, batch.tolist(), 3) for batch in batches])
    torch.testing.assert_close(images, images_of_64[:n], rtol=0, atol=1e-5)


def test_full_precision_images_agree_whatever_their_position_and_company(digits, images_of_64):
    indices = [40, 3, 63, 3, 0]
    images = digits.sample(digits.denoiser, digits.time_grid(4), indices, 3)
    torch.testing.assert_close(images, images_of_64[indices], rtol=0, atol=1e-5)


def test_images_of_different_samples_and_seeds_differ(digits, images_of_64):
    distances = torch.cdist(images_of_64.flatten(1), images_of_64.flatten(1)) + 100 * torch.eye(64)
    assert float(distances.min()) > 0.1
    other = digits.sample(digits.denoiser, digits.time_grid(4), [0], 4)
    assert float((other - images_of_64[:1]).abs().max()) > 0.1


def test_eta_draws_other_images_of_the_same_start(toy):
    grid = toy.time_grid(4)
    smooth = toy.sample(toy.denoiser, grid, range(4), 0)
    assert torch.equal(smooth, toy.sample(toy.denoiser, toy.time_grid(4, eta=0.0), range(4), 0))
    noisy = toy.time_grid(4, eta=1.0)
    rough = toy.sample(toy.denoiser, noisy, range(4), 0)
    assert float((smooth - rough).abs().max()) > 0.01
    assert torch.equal(rough[2:], toy.sample(toy.denoiser, noisy, [2, 3], 0))


def test_clip_sample_of_the_model_reaches_the_sampler(digits, images_of_64):
    assert digits.clip_sample and float(images_of_64.abs().max()) <= 1
    records = []
    digits.sample(digits.denoiser, digits.time_grid(4), range(2), 0, on_step=records.append)
    assert all(float(record.x0.abs().max()) <= 1 for record in records)


@pytest.mark.parametrize("solver", ["dpm_solver", "pndm", "euler"])
def test_images_of_other_solvers_agree_across_batch_sizes(digits, solver):
    grid = digits.time_grid(5, solver=solver)
    together = digits.sample(digits.denoiser, grid, range(8), 3)
    alone = torch.cat([digits.sample(digits.denoiser, grid, [i], 3) for i in range(8)])
    torch.testing.assert_close(alone, together, rtol=0, atol=2e-5)


def test_a_twin_is_independent(digits):
    copied = digits.copy_denoiser()
    with torch.no_grad():
        next(copied.parameters()).zero_()
    assert not torch.equal(next(copied.parameters()), next(digits.denoiser.parameters()))


def test_sampling_starts_where_some_signal_is_left(digits):
    """At the schedule's end, alpha_bar = 2e-9, x0 = (x - eps) / sqrt(alpha_bar) turns rounding errors into 0.02."""
    assert digits.time_grid(20).timesteps[[0, -1]].tolist() == [951, 1]
    assert float(digits.schedule.alphas_cumprod[-1]) < 1e-8 < 1e-3 < float(digits.time_grid(20).alphas_cumprod[0])
    assert digits.time_grid(20, "linspace").timesteps[[0, -1]].tolist() == [999, 0]


def test_example_inputs_and_the_grid_fit_the_model(digits):
    call = digits.example_inputs()
    assert call.x.shape == (1, 1, 16, 16) and call.evaluate(digits.denoiser).shape == call.x.shape
    assert len(digits.time_grid(1000)) == 1000
    with pytest.raises(ConfigError, match=r"sampler\.steps=1001: choose 1\.\.1000"):
        digits.time_grid(1001)


def test_learned_variance_channels_are_dropped():
    class Unet(torch.nn.Linear):
        def forward(self, x, t):
            return type("Output", (), {"sample": torch.cat([x * t.view(-1, 1, 1, 1), x + 100], dim=1)})

    x, t = torch.randn(2, 3, 4, 4), torch.tensor([2.0, 3.0])
    assert torch.equal(UNetDenoiser(Unet(1, 1))(x, t), x * t.view(2, 1, 1, 1))


def test_relative_eps_error_is_measured_on_the_full_precision_states(toy):
    grid = toy.time_grid(8, eta=1.0)
    seen = []

    def worse_with_time(x, t, y=None):
        seen.append((x, t))
        return toy.denoiser(x, t) * (1 + 0.01 * t.view(-1, 1, 1, 1))

    finished = []
    error = relative_eps_error(
        toy, toy.denoiser, worse_with_time, grid, range(5), 2, on_step=lambda: finished.append(1)
    )
    assert error.dtype == torch.float64 and len(finished) == 8
    torch.testing.assert_close(error, 0.01 * grid.timesteps, rtol=1e-5, atol=1e-7)
    records = []
    toy.sample(toy.denoiser, grid, range(5), 2, on_step=records.append)
    for (x, t), record in zip(seen, records, strict=True):
        assert torch.equal(x, record.x) and set(t.tolist()) == {float(grid.timesteps[record.step])}
