"""Activation ranges against numpy on all values, sensitivity against a loop over networks with one quantized layer."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from ptq_exp.diffusion import DiffusionModel, NoiseSchedule, relative_eps_error
from ptq_exp.errors import QuantizationError
from ptq_exp.experiment.analyse import FRACTIONS, quantiles
from ptq_exp.lightning import ActivationModule, SensitivityModule, measure, measure_sensitivity
from ptq_exp.quantization import (
    ActivationTap,
    Policy,
    Widths,
    calibrate_,
    fake_quantize,
    one_layer_quantized,
    probe_of,
    quantize_,
    quantized_layers,
    quantizers,
)
from ptq_exp.storage.pieces import Parts

SEED, STEPS, SCALE = 3, 4, 2.0
SITES = ["first.input_quantizer", "time.input_quantizer", "last.input_quantizer"]


class Tiny(nn.Module):
    """Two convolutions, the second fed by an embedding of time and class."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 1, 3, padding=1)
        self.time = nn.Linear(2, 6)

    def forward(self, x, t, y):
        h = self.first(x) + self.time(torch.stack([t / 40, y.float()], 1))[:, :, None, None]
        return self.last(torch.nn.functional.silu(h)) + 0.5 * x


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    betas = torch.linspace(1e-3, 0.2, 40, dtype=torch.float64)
    schedule = NoiseSchedule((1 - betas).cumprod(0))
    return DiffusionModel(
        "tiny", Tiny().eval(), schedule, (1, 4, 4), clip_sample=True, digest="0", n_classes=3, null_label=3
    )


@pytest.fixture(scope="module")
def quantized(model) -> nn.Module:
    """At 3 bits, so that errors are far from rounding ones."""
    network = model.copy_denoiser()
    rules = Policy(first=["first"], last=["last"], attention=False).rules(Widths(3, 3, first_last=3, boundary=3))
    quantize_(network, rules, model.example_inputs())
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 1, 4, 4, generator=generator)
    calibrate_(network, "minmax", [(x, torch.arange(64.0) % 40, torch.arange(64) % 4)])
    return network


def recorded(model, quantized, trainer, folder, *, n=5, batch=2, values=1000, scale=SCALE, steps=(0, 2, 3)):
    probe = probe_of(quantized, model.denoiser)
    module = ActivationModule(
        model, model.guided(probe, scale), probe, model.time_grid(STEPS, eta=0.5), SITES, steps, seed=SEED,
        values=values, copies=1 if scale == 1 else 2,
    )
    return measure(module, trainer, n, batch, folder / "parts")


def all_values(model, n, scale):
    """Every value that enters the three layers of the full-precision network, per layer and step."""
    network, seen = copy.deepcopy(model.denoiser), []
    for layer in (network.first, network.time, network.last):
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().numpy().ravel()))
    model.run(model.guided(network, scale), model.time_grid(STEPS, eta=0.5), range(n), SEED)
    return [[seen[3 * step + layer] for step in range(STEPS)] for layer in range(3)]


@pytest.mark.parametrize("scale", [1.0, SCALE])
def test_box_plot_numbers_are_those_of_numpy_on_all_values(scale, model, quantized, trainer, tmp_path):
    found = quantiles(**recorded(model, quantized, trainer, tmp_path, scale=scale))
    assert found.shape == (3, 3, 7)
    for layer, values in enumerate(all_values(model, 5, scale)):
        for column, step in enumerate((0, 2, 3)):
            np.testing.assert_allclose(found[layer, column], np.quantile(values[step], FRACTIONS), rtol=1e-5, atol=1e-6)


def test_of_large_tensors_extremes_stay_exact_and_quantiles_near(model, quantized, trainer, tmp_path):
    found = quantiles(**recorded(model, quantized, trainer, tmp_path, n=40, batch=40, values=24))
    (first, _, last) = all_values(model, 40, SCALE)
    for layer, values in ((0, first), (2, last)):
        for column, step in enumerate((0, 2, 3)):
            everything = values[step]
            np.testing.assert_allclose(found[layer, column, [0, -1]], [everything.min(), everything.max()], rtol=1e-5)
            # 24 of 32 or 192 values of each of 40 samples: the quartiles' standard error is about 4 % of the deviation
            near = 0.15 * everything.std()
            np.testing.assert_allclose(found[layer, column, 2:5], np.quantile(everything, FRACTIONS[2:5]), atol=near)


def test_what_is_drawn_depends_neither_on_the_batch_nor_on_chance(model, quantized, trainer, tmp_path):
    runs = []
    for i, batch in enumerate((1, 4, 4)):
        (tmp_path / str(i)).mkdir()
        runs.append(recorded(model, quantized, trainer, tmp_path / str(i), n=4, batch=batch, values=10))
    for name in ("low", "high", "values"):
        np.testing.assert_allclose(runs[0][name], runs[1][name], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(runs[1][name], runs[2][name])


def test_layers_called_several_times_share_and_those_never_called_are_missing(quantized):
    tap = ActivationTap(quantized, SITES, values=5)
    tap.start(2)
    ones = torch.ones(2, 1, 4, 4)
    for factor in (1, 3):
        quantized.first.input_quantizer(factor * ones)
    low, high, values = tap.take()
    quantized.first.input_quantizer(9 * ones)  # closed: not seen
    tap.remove()
    assert low[:, 0].tolist() == [1, 1] and high[:, 0].tolist() == [3, 3]
    assert set(values[:, 0].unique().tolist()) <= {1, 3} and bool(low[:, 1:].isnan().all())
    assert not quantized.first.input_quantizer._forward_pre_hooks


def brute_force(model, quantized, name, grid, n):
    """Relative eps error of a full-precision copy whose layer `name` alone multiplies rounded numbers."""
    network = copy.deepcopy(model.denoiser)
    layer, source = network.get_submodule(name), quantized.get_submodule(name)
    ranges = [{f: getattr(q, f) for f in ("scale", "zero_point", "qmin", "qmax")}
              for q in (source.weight_quantizer, source.input_quantizer)]
    shape = (-1, *[1] * (layer.weight.ndim - 1))
    with torch.no_grad():
        layer.weight.copy_(fake_quantize(layer.weight, **{k: v.view(shape) for k, v in ranges[0].items()}))
    layer.register_forward_pre_hook(
        lambda _, args: fake_quantize(args[0], **{k: v.reshape(()) for k, v in ranges[1].items()})
    )
    guided = [model.guided(denoiser, SCALE) for denoiser in (model.denoiser, network)]
    return relative_eps_error(model, *guided, grid, range(n), SEED)


def test_sensitivity_is_that_of_a_loop_over_networks(model, quantized, trainer, tmp_path):
    grid, steps, probe = model.time_grid(STEPS), [0, 1, 3], probe_of(quantized, model.denoiser)
    layers = quantized_layers(quantized)
    assert layers == ["first", "last", "time"]
    module = SensitivityModule(
        model, model.guided(probe, SCALE), probe, quantized, grid, [[name] for name in layers], steps, range(5),
        seed=SEED, batch_size=2,
    )
    folder = tmp_path / "parts"
    # a killed run had measured one layer already
    Parts(folder, range(3), 3, ("error",)).write(1, error=np.full((1, 3), 7.0))
    error = measure_sensitivity(module, trainer, folder)
    assert error.shape == (3, 3) and (error[1] == 7).all()
    for i in (0, 2):
        expected = brute_force(model, quantized, layers[i], grid, 5)[steps]
        assert float(expected.min()) > 1e-3
        np.testing.assert_allclose(error[i], expected, rtol=1e-4)


def test_a_probe_is_full_precision_before_and_after_and_leaves_the_twin_alone(model, quantized):
    probe, before = probe_of(quantized, model.denoiser), copy.deepcopy(quantized.state_dict())
    inputs = torch.randn(2, 1, 4, 4), torch.tensor([3.0, 9.0]), torch.tensor([0, 1])
    with torch.no_grad():
        expected = model.denoiser(*inputs)
        for name in quantized_layers(quantized):
            with pytest.raises(RuntimeError, match="stop"), one_layer_quantized(probe, quantized, name):
                assert not torch.allclose(probe(*inputs), expected)
                raise RuntimeError("stop")
            assert torch.equal(probe(*inputs), expected)
    assert all(torch.equal(value, before[key]) for key, value in quantized.state_dict().items())
    assert {q.mode.value for _, q in quantizers(quantized)} == {"quantize"}


def test_networks_that_are_no_twins_are_refused(quantized):
    with pytest.raises(QuantizationError, match="first.bias"):
        probe_of(quantized, nn.Linear(2, 2))
