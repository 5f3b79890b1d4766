"""Corrections fitted on the trajectory that they produce."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from ptq_exp.correction import Corrected, final_error_db, fit_on_trajectory, nearest
from ptq_exp.correction.gain_and_offset import Seen, fit_line
from ptq_exp.diffusion import ddim_step
from ptq_exp.embedded import digits_model
from ptq_exp.errors import ConfigError, DataError

GENERATOR = torch.Generator().manual_seed(5)


def seen(wanted_eps, eps, *, x=None, eta=0.0, noise=None, **clamp):
    """A step whose wanted next state is the one of `wanted_eps`."""
    x = torch.randn(eps.shape, generator=GENERATOR) if x is None else x
    wanted, _ = ddim_step(x, wanted_eps, 0.4, 0.7, eta, noise, **clamp)
    return Seen(x, eps, wanted, noise, 0.4, 0.7, eta, **clamp)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("parts", [(True, True), (False, True), (True, False)])
def test_gain_and_offset_are_found_exactly(parts, eta):
    correlation, bias = parts
    true = torch.randn(12, 3, 4, 4, generator=GENERATOR)
    gain, offset = 0.8 if correlation else 1.0, torch.tensor([0.1, -0.2, 0.05]) * bias
    eps = (true - offset.view(1, 3, 1, 1)) / gain
    step = seen(true, eps, eta=eta, noise=torch.randn(eps.shape, generator=GENERATOR))
    line = fit_line([step], correlation=correlation, bias=bias, shrink=False)
    assert float(line.gain) == pytest.approx(gain, abs=1e-5)
    assert torch.allclose(line.offset, offset.double(), atol=1e-5)
    assert torch.allclose(step.next_state(line), step.wanted, atol=1e-5)


@pytest.mark.parametrize("rederive", [True, False])
def test_what_the_clamp_holds_is_followed_only_as_far_as_it_moves(rederive):
    true = torch.randn(16, 1, 8, 8, generator=GENERATOR) * 1.5
    step = seen(true, true - 0.3, clip_sample=True, rederive_eps=rederive)
    line = fit_line([step], correlation=False, bias=True, shrink=False)
    around = [line._replace(offset=line.offset + shift) for shift in (-0.02, 0.0, 0.02)]
    errors = [float((step.next_state(at) - step.wanted).square().mean()) for at in around]
    assert errors[1] == min(errors) and errors[1] < 1e-8
    assert float(line.offset) == pytest.approx(0.3, abs=1e-3)


def test_an_unsure_offset_is_pulled_to_zero():
    true = torch.randn(8, 1, 4, 4, generator=GENERATOR)
    noisy = true + torch.randn(8, 1, 1, 1, generator=GENERATOR)  # the mean of eight errors of size 1
    plain = fit_line([seen(true, noisy)], correlation=False, bias=True, shrink=False)
    shrunk = fit_line([seen(true, noisy)], correlation=False, bias=True, shrink=True)
    assert abs(float(shrunk.offset)) < abs(float(plain.offset))
    assert float(plain.offset_stderr) == pytest.approx(1 / math.sqrt(8), rel=0.6)


class Wrong(nn.Module):
    """A denoiser with a slope and a bias of its own in each step."""

    def __init__(self, denoiser, grid, slopes, biases):
        super().__init__()
        self.denoiser, self.grid, self.slopes, self.biases = denoiser, grid, slopes, biases

    def forward(self, x, t, **conditions):
        step = self.grid.step_of(t)
        slope, bias = (values[step].view(-1, 1, 1, 1) for values in (self.slopes, self.biases))
        return self.denoiser(x, t, **conditions) * (1 + slope) + bias


@pytest.fixture(scope="module")
def model():
    return digits_model()


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_errors_of_known_slope_and_bias_are_undone_to_the_end(model, eta):
    grid = model.time_grid(4, eta=eta)
    slopes, biases = torch.tensor([0.1, 0.05, -0.05, 0.02]), torch.tensor([0.03, -0.02, 0.05, 0.01])
    wrong = Wrong(model.denoiser, grid, slopes, biases)
    found = fit_on_trajectory(
        model, model.denoiser, wrong, grid, range(6), 3, correlation=True, shrink=False, batch_size=4
    )
    assert torch.allclose(found.k.float(), slopes, atol=1e-3)
    assert torch.allclose(found.bias[:, 0].float(), biases, atol=1e-3)
    errors = final_error_db(model, [model.denoiser, wrong, Corrected(wrong, found, grid)], grid, range(6, 10), 3)
    assert errors.shape == (2, 4) and bool((errors[1] < errors[0] - 30).all())
    assert nearest(errors) == 1


def test_the_bias_alone_follows_states_that_it_led_to(model):
    """With a slope that is not fitted, later biases make up for what earlier steps left."""
    grid = model.time_grid(5, eta=0.0)
    wrong = Wrong(model.denoiser, grid, torch.full((5,), 0.1), torch.full((5,), 0.05))
    found = fit_on_trajectory(model, model.denoiser, wrong, grid, range(12), 3, batch_size=12)
    assert bool((found.k == 0).all()) and bool((found.bias != 0).any())
    errors = final_error_db(model, [model.denoiser, wrong, Corrected(wrong, found, grid)], grid, range(12, 20), 3)
    assert float((errors[0] - errors[1]).mean()) > 1


class Half(nn.Module):
    """A first stage whose images are half of their latents, shifted up by as much as is asked for."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.shift = shift

    def decode(self, z):
        return z / 2 + self.shift


def test_errors_of_latents_are_those_of_their_images(model):
    grid = model.time_grid(2, eta=0.0)
    denoisers = [model.denoiser, Wrong(model.denoiser, grid, torch.full((2,), 0.1), torch.full((2,), 0.05))]

    def errors(first_stage):
        return final_error_db(replace(model, first_stage=first_stage), denoisers, grid, range(3), 0)

    assert torch.allclose(errors(Half()), errors(None) + 20 * math.log10(0.5), atol=1e-4)
    assert torch.equal(errors(Half(9.0)), torch.full((1, 3), -120.0).double())  # all white: what is scored is clamped


def test_a_candidate_is_kept_only_where_it_is_surely_better():
    none = torch.tensor([-20.0, -22.0, -18.0, -21.0])
    sure, unsure = none - torch.tensor([1.0, 1.1, 0.9, 1.0]), none - torch.tensor([3.0, -1.0, 2.0, -2.0])
    worse = none + 1
    assert nearest(torch.stack([none, sure, unsure, worse]).double()) == 1
    assert nearest(torch.stack([none, unsure, worse]).double()) == 0
    assert nearest(torch.stack([none, none]).double()) == 0
    assert nearest(torch.stack([none, sure])[:, :1].double()) == 0  # one trajectory is never sure


def test_other_solvers_and_broken_networks_are_refused(model):
    with pytest.raises(ConfigError, match=r"correction.fit=trajectory.*sampler=euler"):
        fit_on_trajectory(model, model.denoiser, model.denoiser, model.time_grid(3, solver="euler"), range(2), 0)
    grid = model.time_grid(3, eta=0.0)
    broken = Wrong(model.denoiser, grid, torch.tensor([0.0, torch.nan, 0.0]), torch.zeros(3))
    with pytest.raises(DataError, match="step 1"):
        fit_on_trajectory(model, model.denoiser, broken, grid, range(2), 0)
