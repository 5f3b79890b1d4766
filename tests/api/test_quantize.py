"""`ptq_exp.quantize`: pipelines, models and networks in one call of Python."""

import numpy as np
import pytest
import torch
from small_pipelines import PROMPTS, SMALL

import ptq_exp
from ptq_exp.errors import ConfigError, DataError
from ptq_exp.quantization.layers import QuantConv2d

QUICK = {"metric": "minmax", "progress": False}


@pytest.fixture(scope="module")
def pipe():
    return SMALL["sd15"].build()


@pytest.fixture(scope="module")
def quantized(pipe):
    return ptq_exp.quantize(pipe, "w8a8", prompts=list(PROMPTS[:2]), steps=3, **SMALL["sd15"].call, **QUICK)


def drawn(pipe, **call):
    settings = {"num_inference_steps": 3, "output_type": "np", "height": 16, "width": 16} | call
    return pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), **settings).images


def test_the_pipeline_is_untouched_and_the_other_near_to_it(pipe, quantized):
    assert type(pipe.unet.conv_in) is torch.nn.Conv2d and "forward" not in vars(pipe.unet)
    assert type(quantized.pipeline.unet.conv_in) is QuantConv2d
    difference = np.abs(drawn(pipe) - drawn(quantized.pipeline)).mean()
    assert 0 < difference < 0.05


def test_other_sizes_and_guidance_than_while_it_was_calibrated(quantized):
    assert drawn(quantized.pipeline, height=32, guidance_scale=1.0).shape == (1, 32, 16, 3)


def test_samples_depend_on_seed_and_index(quantized):
    assert np.array_equal(quantized.sample(3, seed=1, batch_size=2)[:2], quantized.sample(2, seed=1, batch_size=2))


def test_every_step_of_as_many_images_as_prompts(quantized):
    recipe = quantized.recipe["settings"]["calibration"]
    assert (recipe["n_samples"], recipe["steps_per_sample"]) == (2, 3)


def test_a_model_with_our_own_sampler():
    quantized = ptq_exp.quantize(ptq_exp.load_model("digits"), "w8a8", n=16, steps=3, **QUICK)
    assert len(quantized.grid) == 3 and quantized.report.totals["coverage"]["conv_linear"] == 1
    assert quantized.sample(2).shape == (2, 16, 16, 1)


def test_a_network_with_recorded_calls():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    calls = [(torch.randn(rows, 8),) for rows in (32, 16)]
    quantized = ptq_exp.quantize(network, "w8a8", calls=calls, **QUICK)
    x = torch.randn(5, 8)
    found, exact = quantized.component(x), network(x)
    assert 0 < float((found - exact).norm() / exact.norm()) < 0.05
    rounded = ptq_exp.quantize(network, "w4a8", calls=calls, reconstruction="gptq", **QUICK)
    assert rounded.component[0].weight_quantizer.off_grid(rounded.component[0].weight) == 0
    nearest = ptq_exp.quantize(network, "w4a8", calls=calls, **QUICK)
    assert any(not torch.equal(rounded.component[n].weight, nearest.component[n].weight) for n in (0, 2))
    with pytest.raises(ConfigError, match="no sampler"):
        quantized.sample(1)
    with pytest.raises(ConfigError, match="no pipeline"):
        _ = quantized.pipeline


@pytest.mark.parametrize(("arguments", "kind", "said"), [
    ({"model": 3}, ConfigError, r"quantize\(int\): give a pipeline"),
    ({"model": torch.nn.Linear(2, 2)}, ConfigError, "give calls="),
    ({"model": torch.nn.Linear(2, 2), "calls": []}, DataError, "calls: there are none"),
    ({"model": torch.nn.Linear(2, 2), "calls": [(torch.ones(2, 2), 3)]}, DataError, "cannot be called"),
    ({"model": torch.nn.Linear(2, 2), "calls": [(torch.ones(2, 2),)], "heigth": 3}, ConfigError, "no such argument"),
    ({"bits": "w9a9"}, ConfigError, "w9a9"),
    ({"prompts": None}, ConfigError, "prompts"),
    ({"depth": 3}, ConfigError, "takes no depth"),
])
def test_what_cannot_be_is_said_in_one_line(pipe, arguments, kind, said):
    given = {"model": pipe, "bits": "w8a8", "prompts": ["low"]} | arguments
    if "model" in arguments:
        given.pop("prompts")
    with pytest.raises(kind, match=said) as error:
        ptq_exp.quantize(**given, progress=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("bits", "expected"), [
    ("mxfp4", ("mxfp4", "mxfp4")), ("fp8", ("fp8_e4m3fn", "fp8_e4m3fn")), ("w4a16", (4, 16)), ("nvfp4:8", ("nvfp4", 8)),
])
def test_number_formats(bits, expected):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    quantized = ptq_exp.quantize(network, bits, calls=[(torch.randn(8, 32),)], **QUICK)
    settings = quantized.recipe["settings"]["bits"]
    assert (settings["weight"], settings["activation"]) == expected
    assert bool(quantized.component(torch.randn(2, 32)).isfinite().all())
