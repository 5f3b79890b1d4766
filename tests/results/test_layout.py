"""Every entry of results.json is described, and what is described is there: held against four real runs."""

import pkgutil
import runpy
import sys
from pathlib import Path

import pytest
from small_networks import use_blank_pictures, use_one_composition, use_small_networks

from ptq_exp.results.entry import Entry
from ptq_exp.results.layout import LAYOUT, entry_of
from ptq_exp.storage.plain_json import flatten, read_json

SMALL = [
    "sampler.steps=3", "evaluation.n_samples=4", "evaluation.batch_size=4", "evaluation.eps_error_samples=2",
    "evaluation.grid_images=2", "evaluation.fid_resamples=2",
    "calibration.n_samples=4", "calibration.batch_size=4", "trainer.progress_bar=false",
    "trainer.accelerator=cpu", "correction.n_samples=4", "correction.batch_size=4", "reconstruction.iterations=1",
    "metric=minmax", "logger=none",
]
EVERYTHING = [
    "+experiment=ptqd_w4a8", "bits=step_list", "bits.schedule=[8,4,4]", "quantization.smooth=true",
    "reconstruction=gptq", "evaluation.pairs=[ssim,fid_to_fp]",
    "evaluation.gate={psnr: 1000, eps_error: 1000}",
]
ANALYSED = [
    "bits=w8a8", "evaluation=paired", "analysis.active=true", "analysis.n_samples=2", "analysis.sensitivity_samples=1",
    "analysis.layers=['*mid_block*conv1']", "analysis.sensitivity_steps=1", "runtime.compare=openvino",
    "runtime.measure=1", "runtime.measure_memory=true",
]
CHOSEN = ["bits=auto", "bits.budget.size_mb=1", "bits.candidates=[w8a8,w4a4]", "bits.sensitivity_samples=1",
          "bits.solutions=1", "bits.solution_samples=1", "evaluation=paired"]
INFEASIBLE = ["bits=w8a8", "bits.min_bops_ratio=1000"]
ELSEWHERE = {"weights.model", "environment.gpu", "environment.commit", "quantization.not_counted"} | {
    "quantization.dynamic_scales",
    "metric_spec.lpips", "metric_spec.clip", "metrics.lpips", "metrics.clip_score", "metrics.clip_score_change",
}
"""What depends on the machine, or on a network, weights or ranges that no run has; see experiment/test_pairs.py."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """results.json of a run with nearly everything, one that is analysed, one with a budget, and an infeasible one."""
    from ptq_exp.cli.main import main

    folder = tmp_path_factory.mktemp("layout")
    with pytest.MonkeyPatch.context() as patch:
        for use in (use_small_networks, use_blank_pictures, use_one_composition):
            use(patch)
        patch.setattr("ptq_exp.experiment.experiment.SHORT_RUN", 0.0)
        for name, overrides in [("all", EVERYTHING), ("analysed", ANALYSED), ("chosen", CHOSEN), ("no", INFEASIBLE)]:
            given = [f"cache_dir={folder}/cache", f"hydra.run.dir={folder}/{name}", *overrides]
            patch.setattr(sys, "argv", ["ptq_exp", *SMALL, *given])
            if name in ("analysed", "chosen"):
                main()
            else:
                with pytest.raises(SystemExit):  # a missed gate, an infeasible configuration
                    main()
    return [read_json(folder / name / "results.json") for name in ("all", "analysed", "chosen", "no")]


def test_every_entry_of_real_runs_is_described(runs):
    assert [run["status"] for run in runs] == ["finished", "finished", "finished", "infeasible"]
    assert [key for run in runs for key in flatten(run) if entry_of(key) is None] == []


def test_everything_described_is_in_a_real_run(runs):
    found = {entry_of(key).key for run in runs for key in flatten(run)}
    assert {entry.key for entry in LAYOUT} - found <= ELSEWHERE
    assert all(entry.when for entry in LAYOUT if entry.key in ELSEWHERE)


def test_what_all_runs_have_is_in_those_that_finished(runs):
    for run in runs[:3]:
        found = {entry_of(key).key for key in flatten(run)}
        assert [entry.key for entry in LAYOUT if not entry.when and entry.key not in found] == []


@pytest.mark.parametrize("entry", LAYOUT, ids=lambda entry: entry.key)
def test_the_function_that_computes_it_exists(entry):
    pkgutil.resolve_name(f"ptq_exp.{entry.where}")
    assert entry.meaning and entry.unit and "|" not in entry.meaning + entry.unit + entry.when


def test_an_entry_nobody_described_is_found():
    assert entry_of("quantization.something_new") is None and entry_of("something_new") is None
    assert isinstance(entry_of("metrics.fid"), Entry)


def test_the_page_is_current():
    docs = Path(__file__).parents[2] / "docs"
    page = runpy.run_path(str(docs / "generate.py"))["outputs_page"]()
    assert (docs / "outputs.md").read_text() == page, "run: python docs/generate.py"
