"""The Python interface: lazily imported, and image i the same whatever the number of images."""

import subprocess
import sys

import numpy as np
import pytest

import ptq_exp
from ptq_exp.errors import ConfigError


@pytest.fixture(scope="module")
def model():
    return ptq_exp.load_model("digits")


def test_importing_the_package_does_not_import_torch():
    code = "import sys, ptq_exp; assert 'torch' not in sys.modules; assert 'load_model' in dir(ptq_exp)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'laod_model'"):
        _ = ptq_exp.laod_model


def test_images_are_those_of_the_model_and_of_their_index(model):
    images = ptq_exp.sample(model, 5, 3, steps=3, batch_size=4)
    assert images.shape == (5, 16, 16, 1) and images.dtype == np.uint8
    assert np.array_equal(ptq_exp.sample(model, 2, 3, steps=3, batch_size=4), images[:2])
    expected = model.sample(model.denoiser, model.time_grid(3), range(4), 3)
    assert np.array_equal(images[:4], ((expected.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy())


def test_the_published_sampler_is_the_default(model):
    grid = model.time_grid()
    published = model.sampler
    assert (len(grid), grid.eta) == (published.steps, published.eta)


def test_guidance_of_a_model_without_classes_is_refused(model):
    with pytest.raises(ConfigError, match="sampler.guidance_scale=2.0"):
        ptq_exp.sample(model, 1, guidance_scale=2.0, steps=2)


def test_half_precision_denoisers_keep_states_in_float32(model):
    half = ptq_exp.load_model("digits", dtype="bfloat16")
    x, t, _ = half.example_inputs()
    eps = half.denoiser(x + 0.5, t + 100)
    reference = model.denoiser(x + 0.5, t + 100)
    assert eps.dtype == x.dtype and next(half.denoiser.parameters()).element_size() == 2
    assert 0 < float((eps - reference).norm() / reference.norm()) < 0.05
