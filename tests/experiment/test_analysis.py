"""`+experiment=analyze` and report.html through the command, in small."""

import json

import numpy as np
import pytest

from ptq_exp.settings.compose import config_folder
from ptq_exp.storage.plain_json import read_json

QUICK = ("metric=minmax", "logger=none", "analysis.n_samples=4", "analysis.sensitivity_samples=2")
FEW = "analysis.layers=['*conv_in','*conv_out','*up_blocks.0.attentions.0*']"
pytestmark = pytest.mark.usefixtures("small_networks")


@pytest.fixture
def analysed(command):
    """Run the command; returns its folder, its results and analysis.npz."""

    def run(*overrides):
        folder = command("+experiment=analyze", *QUICK, *overrides)
        return folder, read_json(folder / "results.json"), np.load(folder / "analysis.npz")

    return run


def test_analyze_measures_every_quantized_layer_and_reports_it(analysed):
    folder, results, found = analysed()
    layers = {row["name"] for row in json.loads((folder / "quantization.json").read_text())["layers"]
              if row["scope"] == "conv_linear"}
    assert results["name"] == "analyze_w8a8" and set(found["layers"]) > layers
    attention = set(found["layers"]) - layers
    assert attention and all(f"{name}.to_q" in layers for name in attention)
    assert found["activations"].shape == (len(found["sites"]), 3, 7) and np.isfinite(found["activations"]).all()
    assert (np.diff(found["activations"], axis=-1) >= 0).all()
    softmax = [name.endswith("softmax_quantizer") for name in found["sites"]]
    assert sum(softmax) == len(attention) and found["activations"][softmax].min() >= 0
    assert found["activations"][softmax].max() <= 1
    # one layer alone spoils less than all together
    together = max(results["eps_error_per_step"])
    assert found["sensitivity"].shape == (len(found["layers"]), 3)
    assert 0 < found["sensitivity"].max() < together and (found["sensitivity"] > 0).mean() > 0.9
    worst = found["layers"][found["sensitivity"].mean(1).argmax()]
    assert next(iter(results["analysis"]["most_sensitive"])) == worst
    page = (folder / "report.html").read_text()
    assert 'id="activations"' in page and 'id="sensitivity"' in page and str(worst) in page


def test_an_ordinary_run_has_a_report_without_analysis_and_says_how_to_make_it_again(command):
    folder = command("+experiment=ndtc_w8a8", "metric=minmax", "logger=none")
    page = (folder / "report.html").read_text()
    results = read_json(folder / "results.json")
    assert 'id="activations"' not in page and 'id="sensitivity"' not in page and 'id="cost"' in page
    assert not (folder / "analysis.npz").exists() and "analysis" not in results
    assert results["command"].startswith("python -m ptq_exp sampler.steps=3") and results["command"] in page
    assert {"python", "torch", "diffusers", "platform", "threads"} <= set(results["environment"])
    assert "report.html" in (folder / "ndtc_w8a8.log").read_text()


def test_activations_are_reused_whatever_the_bits_and_sensitivity_is_not(analysed):
    _, _, first = analysed(FEW)
    folder, _, second = analysed(FEW, "bits=w4a8")
    said = (folder / "analyze_w4a8.log").read_text()
    assert "activations: reused from the cache" in said and "sensitivity: computed" in said
    assert np.array_equal(first["activations"], second["activations"])
    assert second["sensitivity"].mean() > first["sensitivity"].mean()


@pytest.mark.parametrize(
    "overrides",
    [
        ("model=digits_ldm", "bits=w4a8"),
        ("bits=[8]*3+[4]", "sampler=pndm"),
        ("quantization.temporal=binned", "quantization.temporal_bins=3", "calibration=uniform", "correction=mean"),
    ],
)
def test_every_kind_of_model_can_be_analysed(overrides, analysed):
    _, results, found = analysed(FEW, *overrides)
    assert results["status"] == "finished" and np.isfinite(found["activations"]).all()
    found = dict(zip(found["layers"], found["sensitivity"].mean(1), strict=True))
    assert all(error > 0 for name, error in found.items() if ".attentions" not in name), found
    assert 0 < max(found.values()) < 1


def test_a_saved_model_can_be_analysed_and_ranges_alone_measured(command, analysed):
    folder, _, made = analysed(FEW)
    overrides = ("analysis.active=true", "analysis.sensitivity=false", FEW, *QUICK[1:])
    again = command("+experiment=evaluate", f"quantized={folder}", *overrides)
    found = np.load(again / "analysis.npz")
    assert set(made) - set(found) == {"layers", "sensitivity_steps", "sensitivity"}
    assert all(np.array_equal(made[key], found[key]) for key in found)
    page = (again / "report.html").read_text()
    assert 'id="activations"' in page and 'id="sensitivity"' not in page


def test_mistakes_name_the_setting(refused):
    analysis = "+experiment=analyze"
    assert "analysis.active=true" in refused(*QUICK, analysis, "bits=fp32", "calibration=none")
    assert "quantization.smooth=false" in refused(*QUICK, analysis, "quantization.smooth=true")
    assert "analysis.steps=0: choose 1 or more" in refused(*QUICK, analysis, "analysis.steps=0")
    said = refused(*QUICK, analysis, "analysis.layers=['*nothing*']")
    assert "analysis.layers: '*nothing*' matches no quantized layer" in said


def test_a_report_that_cannot_be_written_spoils_no_results(command, monkeypatch):
    def broken(folder):
        raise ValueError("no ink")

    monkeypatch.setattr("ptq_exp.experiment.outcome.write_run_report", broken)
    folder = command("+experiment=fp32", "logger=none")
    assert read_json(folder / "results.json")["status"] == "finished"
    log = (folder / "fp32.log").read_text(encoding="utf-8")
    assert "report.html was not made (" in log and "no ink" in log and "python -m ptq_exp report" in log


def test_the_experiment_file_says_what_it_does():
    first, second = (config_folder() / "experiment" / "analyze.yaml").read_text().splitlines()[:2]
    assert first == "# @package _global_" and second.startswith("# ")
