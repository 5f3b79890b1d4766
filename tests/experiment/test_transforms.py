"""All transforms in one run: what is left behind is the same model, and says what it costs and where it works."""

import json

import numpy as np
import pytest

import ptq_exp
from ptq_exp.results.record import read_samples
from ptq_exp.storage.plain_json import read_json

TRANSFORMS = (
    "[{name:smooth,online:true,power_of_two:true},{name:rotate,group:16},"
    "{name:low_rank,rank:2,conv3x3:true,iterations:1}]"
)
COMMON_CACHE = True
pytestmark = pytest.mark.usefixtures("small_networks")


def test_a_run_with_all_of_them_saves_the_model_that_drew_its_images(command):
    folder = command(
        "bits=w4a8", f"quantization.transforms={TRANSFORMS}", "metric=minmax", "quantization.shortcut=split",
        "evaluation.n_samples=2", "evaluation.batch_size=2", "evaluation=paired", "logger=none",
    )
    done = read_json(folder / "results.json")["transforms"]
    assert [entry["name"] for entry in done] == ["smooth", "rotate", "low_rank"]
    assert all(entry["sites"] and entry["macs"] > 0 for entry in done)
    assert "not rotated" in done[1]["left"]["unet.conv_in"]
    rows = json.loads((folder / "quantization.json").read_text())["layers"]
    assert sum(row["macs"] for row in rows if "added" in row) == sum(entry["macs"] for entry in done)
    images, _ = read_samples(folder / "samples.npz")
    assert np.array_equal(ptq_exp.load_quantized(folder).sample(2, seed=0, batch_size=2), images)
