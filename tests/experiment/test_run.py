"""Experiments run end to end in small: every metric, repeated runs, records, mistakes."""

import json
import subprocess
import sys

import pytest
from small_networks import use_blank_pictures, use_one_composition, use_small_networks
from wandb_log import read_log

from ptq_exp.reports.tables.runs import gather
from ptq_exp.reports.tables.wandb_source import recorded
from ptq_exp.storage.plain_json import read_json


@pytest.mark.parametrize("metric", ["mse", "kl", "minmax", "percentile"])
def test_every_kind_of_metric_gives_a_working_model(metric, command, monkeypatch):
    """Losses of values, histograms, and two without a search; test_reproduce_commands runs the others."""
    for use in (use_small_networks, use_blank_pictures, use_one_composition):
        use(monkeypatch)
    small = ("logger=none", "evaluation=paired", "evaluation.n_samples=2", "save_quantized=false")
    results = read_json(command("+experiment=ndtc_w8a8", f"metric={metric}", *small) / "results.json")
    assert results["metrics"]["eps_error"] < 0.1


@pytest.mark.usefixtures("small_networks")
def test_a_second_run_reuses_artefacts_and_repeats_every_number(command):
    overrides = ("+experiment=ndtc_w8a8", "metric=minmax", "logger=none", "seed=7")
    folders = [command(*overrides) for _ in range(2)]
    first, second = (read_json(folder / "results.json") for folder in folders)
    said = [(folder / "ndtc_w8a8.log").read_text() for folder in folders]
    for artefact in ("calibration set ndtc", "FP32 images"):
        assert f"{artefact}: computed" in said[0] and f"{artefact}: reused from the cache" in said[1]
    assert "reference features: reused from the cache" in said[1]
    assert first["metrics"] == second["metrics"]
    assert first["eps_error_per_step"] == second["eps_error_per_step"]


@pytest.mark.usefixtures("small_networks")
def test_keep_fp_leaves_operations_alone_and_says_so(command):
    folder = command("metric=minmax", "logger=none", "quantization.keep_fp=['*time_embedding*']")
    layers = json.loads((folder / "quantization.json").read_text())["layers"]
    rows = [row for row in layers if "time_embedding" in row["name"]]
    assert rows and all(row["weight_bits"] is None and row["reason"] == "quantization.keep_fp" for row in rows)


@pytest.mark.usefixtures("small_networks")
def test_wandb_offline_run_holds_config_metrics_and_tags(command):
    folder = command("+experiment=ndtc_w8a8", "metric=minmax", "logger.tags=[mine]", "logger.group=g1")
    (run,) = (folder / "wandb").glob("offline-run-*")
    (log,) = run.glob("run-*.wandb")
    results, written = gather([folder]).iloc[0], read_log(log)
    logged = recorded(written["config"], written["summary"])
    numbers = ("metrics.", "metric_spec.", "quantization.", "real.", "fp32.")
    same = {key: value for key, value in results.items() if key.startswith(numbers)}
    assert len(same) > 20 and {key: logged.get(key) for key in same} == same  # the same table from either
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    lines = subprocess.run(inspect, capture_output=True, text=True, check=True, timeout=120).stdout.splitlines()
    records = [json.loads(line) for line in lines]
    text = "\n".join(lines)
    (started,) = (record for record in records if record["type"] == "run")
    assert "g1" in json.dumps(started) and "mine" in json.dumps(started)
    for key in ("fid", "sfid", "psnr", "fp32/fid", "eps_error_of_step", "fixed_pattern_share_of_step", "bops_ratio",
                "media/images/grid", "media/images/pictures/eps_error", "layers"):
        assert key in text, key


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["metrc=mse"], "error: metrc: no such setting; did you mean 'metric'?"),
        (["sampler.step=3"], "error: sampler.step: no such setting; did you mean 'sampler.steps'?"),
        (["metric=mae"], "error: metric=mae: choose one of cosine, kl, l1, lp, minmax, mse, percentile"),
        (["bits=1"], "error: bits=1: choose one of auto, fp32, fp8, mxfp4, mxfp8, nf4, nvfp4, step_budget, "),
        (["bits.weight=1"], "error: bits.weight=1: choose 2..8"),
        (["bits.weight=eight"], "error: bits.weight"),
        (["+experiment=ndtc_w9"], "error: experiment=ndtc_w9: choose one of "),
        (["sampler.steps=5000"], "error: sampler.steps=5000: choose 1..1000"),
        (["model.dtype=int8"], "error: model.dtype=int8: choose one of float32, bfloat16, float16"),
        (["model.checkpoint=no.safetensors"], "error: model.checkpoint=no.safetensors: no such file"),
        (["quantization.keep_fp=['*nothing*']"], "error: rule '*nothing*' (quantization.keep_fp) matches no"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_1(overrides, message, command, capsys):
    with pytest.raises(SystemExit) as stop:
        command("metric=minmax", "logger=none", *overrides)
    lines = [line for line in (str(stop.value) + "\n" + capsys.readouterr().err).splitlines() if "error:" in line]
    assert len(lines) == 1 and lines[0].startswith(message)
    assert stop.value.code not in (None, 0)


def test_a_failed_run_leaves_its_error_in_the_results(command, tmp_path):
    with pytest.raises(SystemExit):
        command("metric=minmax", "logger=none", "quantization.keep_fp=['*nothing*']")
    (path,) = tmp_path.glob("*/results.json")
    results = read_json(path)
    assert results["status"] == "failed" and "*nothing*" in results["error"]
