"""Every experiment file runs end to end in small, and leaves what it promises."""

import json
from dataclasses import replace

import numpy as np
import pytest
from guide_runs import SMALL, assert_recorded, planned
from guide_text import conf
from PIL import Image
from small_networks import use_blank_pictures, use_few_candidate_ranges, use_one_composition, use_small_networks

from ptq_exp.results.record import read_samples
from ptq_exp.settings.compose import config_folder
from ptq_exp.storage.plain_json import read_json

OTHERS = ("evaluate", "analyze")  # tested in files of their own
EXPERIMENTS = sorted(p.stem for p in (config_folder() / "experiment").glob("*.yaml") if p.stem not in OTHERS)
RECONSTRUCTED = ("best_w", "brecq", "deploy_w4", "gptq", "kit", "qdiffusion", "qdrop", "tfmq")
# coverage of convolutions and linear layers, and (weight, activation) bits of the first and the last convolution
AS_PUBLISHED = {
    "ptq4dm_release": (0.002, [(8, None), (8, None)]), "tfmq_release": (0.8715, [(None, None), (None, None)]),
}
WITH_BITS = {"dynamic": "dynamic_w8a8", "gptq": "uniform_gptq_w4a8"}
"""Names of runs of the files that are named by their method alone."""
WITH_TRANSFORMS = {
    "convrot": ("convrot_w8a8", 0.8779, ["rotate"]), "svdquant": ("svdquant_w4a4", 0.8370, ["smooth", "low_rank"]),
    "kit_low_rank_w4a4": ("kit_low_rank_w4a4", 0.8726, ["low_rank"]),
}
"""Name of the run, coverage of the small network, where what transforms compute is not covered, and transforms."""
OF_THREE_LEVELS = ("kit_w4a8",)
"""Files that name levels which the small network lacks."""
DRAWN = ("brecq_w4a8", "fp32", "ndtc_w8a8", "ptqd_mp", "ptqd_w4a8", "tfmq_w4a4")
"""Of each kind of picture one is really drawn; the others are blank, of the same size."""
COMMON_CACHE = True
OTHER_BITS = {
    "ndtc_w4a4": "ndtc_w8a8", "ndtc_w4a8": "ndtc_w8a8", "ndtc_w6a6": "ndtc_w8a8", "ptqd_w3a8": "ptqd_w4a8",
    "ptqd_w8a8": "ptqd_w4a8", "qdiffusion_w4a4": "qdiffusion_w4a8", "qdiffusion_w8a8": "qdiffusion_w4a8",
    "tfmq_w4a8": "tfmq_w4a4",
}
"""Files that differ from another in the bits alone: they are planned, the other one runs."""
FEWER = {"auto": ("bits.candidates=[w8a8,w4a4]", "bits.sensitivity_samples=1", "bits.solutions=1",
                  "bits.solution_samples=1")}
OF_LDM4 = [name for name in EXPERIMENTS if "_ldm4_" in name]  # run in test_noise


@pytest.mark.parametrize(("name", "like"), OTHER_BITS.items())
def test_an_experiment_with_other_bits_is_planned_as_the_one_that_runs(name, like, monkeypatch):
    use_small_networks(monkeypatch)
    config, known = (conf(*SMALL, f"+experiment={one}") for one in (name, like))
    weight, activation = map(int, name.rpartition("_w")[2].split("a"))
    assert (config.bits.weight, config.bits.activation) == (weight, activation)
    bits = replace(known.bits, name=config.bits.name, weight=weight, activation=activation)
    assert config == replace(known, bits=bits, name=name)
    report = planned(config)
    assert report.totals["coverage"]["conv_linear"] == 1
    layers = [row for row in report.rows if row.scope == "conv_linear"]
    inner = [row for row in layers if not row.name.endswith(("conv_in", "conv_out"))]
    assert {(row.weight_bits, row.activation_bits) for row in inner} == {(weight, activation)}


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in (*OF_LDM4, *OTHER_BITS)])
def test_experiment_runs_and_leaves_its_results(name, command, monkeypatch):
    """As it stands, with the default logger; the published coverages are those of the whole embedded network."""
    if name not in (*AS_PUBLISHED, *OF_THREE_LEVELS):
        use_small_networks(monkeypatch)
    if name not in DRAWN:
        use_blank_pictures(monkeypatch)
    use_few_candidate_ranges(monkeypatch)
    use_one_composition(monkeypatch)
    folder = command(f"+experiment={name}", *FEWER.get(name, ()))
    results = read_json(folder / "results.json")
    assert_recorded(folder)
    called = f"uniform_{name}" if name.startswith(("brecq", "qdrop")) else name.replace("_mp", "_step_budget")
    called = f"{name}_w8a8" if name in AS_PUBLISHED else called
    called = WITH_BITS.get(name, called)
    called, covered, transforms = WITH_TRANSFORMS.get(name, (called, 1, []))
    assert (results["status"], results["name"]) == ("finished", called)
    assert set(results["metrics"]) >= {"is", "fid", "sfid", "precision", "recall"}
    assert set(results["metric_spec"]) == {"extractor", "preprocessing", "reference", "n_samples", "seed"}
    images, labels = read_samples(folder / "samples.npz")
    assert images.shape == (10, 16, 16, 1) and images.dtype == np.uint8 and labels is None
    assert Image.open(folder / "grid.png").width > 4 * 64
    if name == "fp32":
        assert results["metrics"] == results["fp32"] and not (folder / "quantization.json").exists()
        return
    coverage, ends = AS_PUBLISHED.get(name, (covered, [(8, 16), (8, 16)]))
    assert results["quantization"]["coverage_conv_linear"] == pytest.approx(coverage, abs=1e-3)
    assert len(results["eps_error_per_step"]) == 3 and min(results["eps_error_per_step"]) > 0
    assert len(results["fixed_pattern_share_per_step"]) == 3 and Image.open(folder / "eps_error.png").width >= 800
    assert [done["name"] for done in results.get("transforms", [])] == transforms
    assert ("correction" in results) == name.startswith(("ptqd", "deploy", "best_w8a8"))
    assert ("reconstruction" in results) == (folder / "reconstruction.json").exists() == name.startswith(RECONSTRUCTED)
    layers = json.loads((folder / "quantization.json").read_text())
    first_and_last = [row for row in layers["layers"] if row["name"].endswith(("conv_in", "conv_out"))]
    assert [(row["weight_bits"], row["activation_bits"]) for row in first_and_last] == ends
    assert all(len(q["scale"]) >= 1 for q in layers["quantizers"].values())
