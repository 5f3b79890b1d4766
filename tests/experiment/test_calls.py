"""Models of other calls than (x, t) -> eps through the whole command, saved and loaded again without their folder."""

import numpy as np
import pytest
from small_calls import bare_folder, conditional_unet, tokens
from small_folders import ddim, pixel_folder

import ptq_exp
from ptq_exp.results.record import read_samples
from ptq_exp.storage.plain_json import read_json

pytestmark = pytest.mark.usefixtures("blank_pictures")
COMMON = ("metric=minmax", "logger=none", "model=diffusers", "evaluation=paired", "evaluation.n_samples=5")
BRECQ = ("bits=w4a8", "reconstruction=brecq")


def prediction(kind):
    return lambda folder: (pixel_folder(folder, ddim(prediction_type=kind, clip_sample=True)), None)


def classes(folder):
    return pixel_folder(folder, ddim(), num_class_embeds=3), None


def text(folder):
    none = np.zeros((4, 12), np.float32)
    conditions = tokens(folder.parent / "text.npz", 3, **{"unconditional.encoder_hidden_states": none})
    return bare_folder(folder, conditional_unet(), ddim()), conditions


CASES = {
    "v_prediction": (prediction("v_prediction"), (*BRECQ, "quantization=tfmq", "calibration=uniform",
                                                  "calibration.n_samples=12", "sampler.eta=1", "correction=ptqd")),
    "sample": (prediction("sample"), ("bits=step_budget", "correction=ptqd", "bits.gain_samples=2")),
    "classes": (classes, ("bits=w8a8", "analysis.active=true", "correction=ptqd")),
    "text": (text, (*BRECQ, "sampler.guidance_scale=2", "correction=ptqd", "quantization.smooth=true")),
}


@pytest.mark.parametrize("name", list(CASES))
def test_from_folder_to_saved_model(command, name, tmp_path):
    make, overrides = CASES[name]
    (tmp_path / "in").mkdir()
    folder, conditions = make(tmp_path / "in" / "model")
    given = () if conditions is None else (f"model.conditions={conditions}",)
    run = command(*COMMON, f"model.checkpoint={folder}", *given, *overrides)
    results = read_json(run / "results.json")
    assert results["status"] == "finished" and results["quantization"]["coverage_conv_linear"] == 1
    assert 0 < results["metrics"]["eps_error"] < 1
    (tmp_path / "in" / "model").rename(tmp_path / "in" / "elsewhere")
    quantized = ptq_exp.load_quantized(run)
    images, labels = read_samples(run / "samples.npz")
    assert np.array_equal(ptq_exp.sample(quantized, 5, batch_size=5), images) and not quantized.full_precision
    assert (labels is not None) == (name == "classes")
    eps = quantized.model.example_inputs().evaluate(quantized.network)
    assert bool(eps.isfinite().all())
