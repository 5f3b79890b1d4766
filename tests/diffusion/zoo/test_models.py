"""Models by name: misspelt names and options, number types, random weights."""

import inspect
from importlib import import_module

import pytest
import torch

from ptq_exp.diffusion.zoo.build import RandomWeightsWarning, cosine_alphas_cumprod, linear_alphas_cumprod
from ptq_exp.diffusion.zoo.registry import MODELS, load_model
from ptq_exp.errors import ConfigError

ZOO = [name for name, target in MODELS.items() if "zoo" in target]


@pytest.mark.parametrize("name", ZOO)
def test_every_builder_takes_the_common_arguments(name):
    module, _, function = MODELS[name].partition(":")
    parameters = inspect.signature(getattr(import_module(module), function)).parameters
    assert {"checkpoint", "name", "dtype"} <= parameters.keys()


def test_digits_by_name():
    model = load_model("digits")
    assert model.name == "digits" and model.sample_shape[0] == 1


def test_a_misspelt_name_has_a_nearest_one():
    with pytest.raises(ConfigError, match=r"model\.name=ddim_cifar: did you mean 'ddim_cifar10'"):
        load_model("ddim_cifar")
    with pytest.raises(ConfigError, match=r"model\.name=zzz: valid: .*digits"):
        load_model("zzz")


def test_an_unknown_option_is_an_error():
    with pytest.raises(ConfigError, match=r"model\.emma: .*did you mean 'ema'"):
        load_model("ldm4_lsun_bedrooms256", emma=True)
    with pytest.raises(ConfigError, match=r"model\.ema: the model ddpm_cifar10 has no such option; there are none"):
        load_model("ddpm_cifar10", ema=True)


@pytest.mark.parametrize("name", ZOO)
def test_an_unknown_dtype_lists_the_known_ones(name):
    with pytest.raises(ConfigError, match=r"model\.dtype=int8: choose one of float32, bfloat16, float16"):
        load_model(name, dtype="int8")


def test_random_weights_are_loud_and_always_the_same():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with pytest.warns(
        RandomWeightsWarning, match="ddpm_cifar10: no checkpoint is given, random weights: for benchmarks"
    ):
        first = load_model("ddpm_cifar10", dtype="float16")
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    with pytest.warns(RandomWeightsWarning):
        second = load_model("ddpm_cifar10", dtype="float16")
    assert first.digest == second.digest == "random-ddpm_cifar10"
    weights = zip(first.denoiser.parameters(), second.denoiser.parameters(), strict=True)
    assert all(torch.equal(a, b) and a.dtype == torch.float16 for a, b in weights)


def test_schedules():
    cosine = cosine_alphas_cumprod(4000)
    assert len(cosine) == 4000 and bool((cosine[1:] < cosine[:-1]).all())
    assert float(cosine[-1]) == pytest.approx(1.5e-10, rel=0.1)
    linear = linear_alphas_cumprod()
    assert float(linear[0]) == pytest.approx(0.9999, abs=1e-9) and float(linear[-1]) == pytest.approx(
        4.0358e-5, rel=1e-4
    )
