"""Networks that predict v or x0, as estimates of the noise."""

import pytest
import torch

from ptq_exp.diffusion import AsEps, DiffusionModel, NoiseSchedule, as_eps, sample
from ptq_exp.errors import ConfigError

SCHEDULE = NoiseSchedule((1 - torch.linspace(1e-3, 0.2, 40, dtype=torch.float64)).cumprod(0), time_scale=25.0)
X0, EPS = torch.randn(2, 4, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
INDEX = torch.tensor([0, 7, 20, 39])


def state(alpha_bar):
    alpha, sigma = (part.view(-1, 1, 1, 1) for part in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
    return alpha, sigma, alpha * X0 + sigma * EPS


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_the_noise_of_a_state_is_found_from_what_an_exact_network_predicts(prediction):
    """v = alpha eps - sigma x0 (Salimans and Ho 2022); each sample at its own time, in float64."""
    alpha, sigma, x = state(SCHEDULE.alphas_cumprod[INDEX])
    target = alpha * EPS - sigma * X0 if prediction == "v_prediction" else X0
    denoiser = as_eps(Returns(target), prediction, SCHEDULE)
    found = denoiser(x, INDEX * 25.0, y=torch.arange(4))
    torch.testing.assert_close(found, EPS, rtol=0, atol=1e-11)
    assert denoiser(x.float(), INDEX * 25.0, y=None).dtype == torch.float32
    assert denoiser.state_dict() == {} and denoiser.network.given == {"y": None}


class Returns(torch.nn.Module):
    """A network that always returns `value`."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x, t, **conditions):
        self.given = conditions
        return self.value.to(x.dtype)


def test_between_two_times_the_ratio_of_noise_to_signal_is_linear():
    levels = SCHEDULE.alphas_cumprod
    ratio = 0.75 * ((1 - levels[3]) / levels[3]).sqrt() + 0.25 * ((1 - levels[4]) / levels[4]).sqrt()
    alpha, sigma, x = state((1 / (1 + ratio**2)).expand(4))
    found = AsEps(Returns(alpha * EPS - sigma * X0), "v_prediction", SCHEDULE)(x, torch.full((4,), 3.25 * 25))
    torch.testing.assert_close(found, EPS, rtol=0, atol=1e-11)


def test_a_network_of_the_noise_stays_as_it_is():
    network = Returns(EPS)
    assert as_eps(network, "epsilon", SCHEDULE) is network
    with pytest.raises(ConfigError, match="prediction_type=flow_prediction: choose one of epsilon, v_prediction"):
        as_eps(network, "flow_prediction", SCHEDULE)


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_times_of_no_signal_or_no_noise_are_refused(level):
    levels = torch.tensor([0.9, 0.0] if level == 0 else [1.0, 0.1], dtype=torch.float64)
    with pytest.raises(ConfigError, match="must lie between 0 and 1"):
        AsEps(Returns(EPS), "v_prediction", NoiseSchedule(levels))


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_an_exact_network_of_one_image_leads_to_it(prediction):
    image = torch.tensor([[[0.5, -0.25], [1.0, -1.0]]], dtype=torch.float64)

    class Exact(torch.nn.Module):
        def forward(self, x, t):
            if prediction == "sample":
                return image.expand_as(x)
            level = SCHEDULE.alphas_cumprod[(t / 25).long()].view(-1, 1, 1, 1)
            return (level.sqrt() * x - image) / (1 - level).sqrt()

    denoiser = as_eps(Exact(), prediction, SCHEDULE)
    model = DiffusionModel("exact", denoiser, SCHEDULE, (1, 2, 2), clip_sample=False, digest="")
    noise = type("Noise", (), {"draw": lambda self: EPS})()
    found = sample(denoiser, model.time_grid(7), noise)
    torch.testing.assert_close(found, image.expand(4, 1, 2, 2), rtol=0, atol=1e-10)
