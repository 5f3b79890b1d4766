"""A saved quantized model, evaluated by the command, gives what its run gave: every kind of quantization, in small."""

import numpy as np
import pytest

import ptq_exp
from ptq_exp.results.record import read_samples
from ptq_exp.storage.plain_json import read_json

SCHEDULED = ("bits=step_list", "bits.schedule='[8]*2+[4]'", "bits.candidates=[4,8]")
pytestmark, COMMON_CACHE = pytest.mark.usefixtures("small_networks"), True


def images(folder):
    return read_samples(folder / "samples.npz")[0]


@pytest.mark.parametrize(
    "overrides",
    [
        ("bits=w8a8",),
        ("+experiment=ptqd_w4a8",),
        ("+experiment=ptqd_w3a8", *SCHEDULED, "bits.weight=3"),
        ("model=digits_ldm", "bits=w4a8", "correction=ptqd", "sampler.eta=1"),
        ("+experiment=tfmq_w4a8", "reconstruction=brecq", "reconstruction.step_lr=0.01"),
        ("+experiment=qdiffusion_w4a4",),
        ("quantization.smooth=true", "bits=w4a8", "reconstruction=brecq"),
    ],
)
def test_an_evaluation_repeats_the_run_bit_for_bit(overrides, run_of, command):
    folder = run_of(*overrides)
    first = read_json(folder / "results.json")
    again = command("logger=none", "+experiment=evaluate", f"quantized={folder}")
    second = read_json(again / "results.json")
    assert np.array_equal(images(folder), images(again))
    assert second["metrics"] == first["metrics"] and second["quantization"] == first["quantization"]
    for name in ("eps_error", "fixed_pattern_share"):
        assert second[f"{name}_per_step"] == first[f"{name}_per_step"]
    assert second["evaluations"] == first["evaluations"] and second.get("transforms") == first.get("transforms")
    assert second["name"] == f"evaluate_{first['config']['bits']['name']}"
    assert "calibration_set" not in second["seconds"] and not (again / "quantized").exists()
    quantized = ptq_exp.load_quantized(folder / "quantized")
    assert quantized.full_precision
    assert np.array_equal(ptq_exp.sample(quantized, 7, batch_size=5), images(folder)[:7])


def test_ranges_per_step_demand_their_grid(run_of, refused):
    folder = run_of("+experiment=tfmq_w4a8")
    said = refused("logger=none", "+experiment=evaluate", f"quantized={folder}", "sampler.steps=2")
    assert "has ranges for each sampling step (quantization.temporal=per_step) of another grid" in said
