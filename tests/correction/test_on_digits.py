"""The embedded model with 3-bit weights: what the correction promises, on trajectories that it was not fitted on."""

import pytest
import torch

from ptq_exp.correction import (
    Corrected,
    MomentChunks,
    Scheduled,
    VarianceFit,
    fit_moments,
    relative_error,
    residual_histogram,
    sample_moments,
    standardised_residual,
)
from ptq_exp.diffusion import SampleNoise, relative_eps_error
from ptq_exp.diffusion.noise import CALIBRATION, EVALUATION
from ptq_exp.diffusion.paired import paired_estimates
from ptq_exp.embedded import digits_model
from ptq_exp.errors import ConfigError
from ptq_exp.quantization import Policy, Widths, calibrate_, quantize_

STEPS, SEED = 5, 0


def moments(model, quantized, grid, n, stream, **kwargs):
    """[n, 1, S, C, M] on `n` trajectories of a stream."""
    found = []
    paired_estimates(
        model, model.denoiser, [quantized], grid, range(n), SEED, stream=stream, **kwargs,
        on_pair=lambda step, eps, others: found.append(sample_moments(eps, others[0])),
    )
    return torch.stack(found, 1).unsqueeze(1).numpy()


@pytest.fixture(scope="module")
def model():
    return digits_model()


@pytest.fixture(scope="module")
def quantized(model):
    network = model.copy_denoiser()
    quantize_(network, Policy().rules(Widths(3, 8)), model.example_inputs())
    grid = model.time_grid(STEPS)
    states = []
    model.run(model.denoiser, grid, range(8), 7, on_step=lambda r: states.append((r.x, grid.network_time(r.step, 8))))
    calibrate_(network, "minmax", states)
    return network


def fitted(model, quantized, grid, n=24, **kwargs):
    noise = MomentChunks(moments(model, quantized, grid, n, CALIBRATION, **kwargs))
    return fit_moments(noise, len(grid), 256, shrink=True, repeats=grid.first_with_time)


@pytest.mark.parametrize("solver", ["ddim", "dpm_solver", "pndm", "euler"])
def test_the_mean_correction_brings_estimates_and_images_nearer_to_full_precision(solver, model, quantized):
    grid = model.time_grid(STEPS, eta=0.0, solver=solver)
    statistics = fitted(model, quantized, grid)
    corrected = Corrected(quantized, statistics, grid)
    held_out = MomentChunks(moments(model, quantized, grid, 24, EVALUATION))
    before, after = (relative_error(held_out, len(grid), s) for s in (None, statistics))
    assert float((after / before).mean()) < 0.95 and float((after / before).max()) < 1.01
    images = [model.sample(d, grid, range(24), SEED) for d in (model.denoiser, quantized, corrected)]
    errors = [float((image - images[0]).square().mean()) for image in images[1:]]
    assert errors[1] < 0.9 * errors[0]


def test_errors_in_closed_form_are_those_of_the_corrected_denoiser(model, quantized):
    grid = model.time_grid(STEPS, eta=1.0)
    statistics = fitted(model, quantized, grid)
    noise = MomentChunks(moments(model, quantized, grid, 4, EVALUATION))
    for denoiser, found in ((quantized, None), (Corrected(quantized, statistics, grid), statistics)):
        direct = relative_eps_error(model, model.denoiser, denoiser, grid, range(4), SEED)
        torch.testing.assert_close(relative_error(noise, STEPS, found), direct, rtol=1e-4, atol=0)


def test_the_sampler_makes_room_for_the_residual(model, quantized):
    """At eta = 1 each step's own noise shrinks by what the residual brings; its mean stays. First step, by hand."""
    grid = model.time_grid(STEPS, eta=1.0)
    statistics = fitted(model, quantized, grid)
    corrected = Corrected(quantized, statistics, grid)
    plain, fitting = [], []
    for records, std in ((plain, None), (fitting, statistics.eps_noise_std)):
        model.run(corrected, grid, range(4), SEED, eps_noise_std=std, on_step=records.append)
    assert torch.equal(plain[0].eps, fitting[0].eps)
    fit = VarianceFit.of(grid, statistics.eps_noise_std)
    sigma = float(fit.available[0]) ** 0.5
    own = float((fit.available[0] - fit.needed[0]).clamp(min=0)) ** 0.5
    z = SampleNoise(SEED, range(4), model.sample_shape)
    z.draw()
    inside = plain[0].x0.abs() < 1  # a clamped x0 carries no noise of eps: sigma stays there
    shift = ((own - sigma) * z.draw())[inside]
    assert own < sigma and bool(inside.any())
    torch.testing.assert_close((fitting[0].x_prev - plain[0].x_prev)[inside], shift, rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match="eps_noise_std"):
        model.run(corrected, grid, range(4), SEED, eps_noise_std=statistics.eps_noise_std[:-1])


def test_following_the_quantized_trajectory_sees_its_states(model, quantized):
    grid = model.time_grid(STEPS, eta=0.0)
    seen = []
    paired_estimates(
        model, model.denoiser, [quantized], grid, range(2), SEED, follow="quantized",
        on_pair=lambda step, eps, others: seen.append((eps, others[0])),
    )
    records = []
    model.run(quantized, grid, range(2), SEED, on_step=records.append)
    for (eps, eps_q), record in zip(seen, records, strict=True):
        assert torch.equal(eps_q, record.eps)
        with torch.no_grad():
            assert torch.equal(eps, model.denoiser(record.x, grid.network_time(record.step, 2)))
    with pytest.raises(ConfigError, match="correction.follow=both: choose one of fp32, quantized"):
        paired_estimates(model, model.denoiser, [quantized], grid, range(2), SEED, None, follow="both")


def test_residuals_are_counted_in_units_of_their_deviation(model, quantized):
    grid = model.time_grid(STEPS)
    statistics = fitted(model, quantized, grid)
    counts = []
    paired_estimates(
        model, model.denoiser, [quantized], grid, range(6), SEED, stream=CALIBRATION,
        on_pair=lambda s, eps, others: counts.append(
            residual_histogram(standardised_residual(eps, others[0], statistics, s))
        ),
    )
    counts = torch.stack(counts, 1)
    assert counts.shape == (6, STEPS, 60) and bool((counts.sum(2) == 256).all())
    share_within_one = counts[..., 25:35].sum() / counts.sum()
    assert 0.55 < float(share_within_one) < 0.85  # 0.683 for a Gaussian


def test_a_schedule_can_be_corrected_too(model):
    network = model.copy_denoiser()
    quantize_(network, Policy().rules(Widths(8, (4, 8))), model.example_inputs())
    grid = model.time_grid(STEPS)
    batches = [(torch.randn(4, 1, 16, 16), grid.network_time(step, 4)) for step in range(STEPS)]
    calibrate_(network, "minmax", batches)
    scheduled = Scheduled(network, torch.tensor([0, 1, 0, 1, 1]), grid)
    statistics = fitted(model, scheduled, grid)
    errors = relative_error(MomentChunks(moments(model, scheduled, grid, 8, EVALUATION)), STEPS, None)
    assert float(errors[[0, 2]].min()) > 2 * float(errors[[1, 3]].max())
    images = model.sample(Corrected(scheduled, statistics, grid), grid, range(4), SEED)
    assert bool(images.isfinite().all())
