"""The ablation of noise correction: its rows and their order, averages by hand, and what is left out or refused."""

import math

import pandas as pd
import pytest

from ptq_exp.errors import DataError
from ptq_exp.reports.tables.ablation import TITLES, ablation
from ptq_exp.reports.tables.tables import collect
from ptq_exp.storage.plain_json import write_json

SPEC = {"extractor": "digits", "reference": "train", "n_samples": 512}


def write(root, bits="w4a8", correction="none", seed=0, *, model="digits", eta=1.0, fid=1.0, run=None, **extra):
    """A run as an experiment leaves it; correction None: from before there were corrections."""
    config = {
        "name": f"{correction}_{bits}", "seed": seed, "model": {"name": model}, "sampler": {"name": "ddim", "eta": eta},
        "bits": {"name": bits}, "calibration": {"name": "uniform"}, "metric": {"name": "mse"},
        "correction": {"name": correction, "n_samples": 256},
    }  # fmt: skip
    metrics = {"fid": fid, "sfid": 2.0, "is": 9.0}
    values = {"status": "finished", "seed": seed, "config": config, "metrics": metrics, "metric_spec": SPEC}
    if correction is None:
        del config["correction"]
    if bits == "fp32":
        config["calibration"]["name"] = "none"
    else:
        metrics |= {"psnr": 30.0 + seed, "eps_error": 0.01 * (1 + seed), "eps_error_uncorrected": 0.9}
        values["quantization"] = {"bops_ratio": 15.973}
    for key, changes in extra.items():
        values[key] = values[key] | changes if isinstance(changes, dict) else changes
    values = {key: value for key, value in values.items() if value is not None}
    name = run or f"{model}_{eta}_{bits}_{correction}_{seed}"
    write_json(root / name / "results.json", values)


def table_of(root):
    return ablation(collect(root))


def rows_of(root):
    table = table_of(root)
    return list(zip(table["config.bits.name"], table["correction"], strict=True))


def test_rows_stand_in_the_order_of_the_parts(tmp_path):
    for correction in ("ptqd", "none", "mean", "correlation", "bias", "another"):
        write(tmp_path, correction=correction)
    parts = ["baseline", "+ bias", "+ correlation", "+ correlation, bias", "+ variance", "+ another"]
    assert rows_of(tmp_path) == [("w4a8", part) for part in parts]


def test_blocks_stand_in_the_order_of_model_eta_and_bits_after_full_precision(tmp_path):
    for bits in ("step_snr", "w3a8", "fp32", "w8a8", "w4a8"):
        write(tmp_path, bits)
    write(tmp_path, "w8a8", eta=0.0)
    write(tmp_path, "w8a8", model="another")
    table = table_of(tmp_path)
    keys = ["config.model.name", "config.sampler.eta", "config.bits.name"]
    assert list(table[keys].itertuples(index=False, name=None)) == [
        ("another", 1.0, "w8a8"), ("digits", 0.0, "w8a8"), ("digits", 1.0, "fp32"), ("digits", 1.0, "w8a8"),
        ("digits", 1.0, "w4a8"), ("digits", 1.0, "w3a8"), ("digits", 1.0, "step_snr"),
    ]  # fmt: skip


def test_a_bit_schedule_ends_in_mixed_precision(tmp_path):
    for bits in ("step_budget", "w8a8"):
        for correction in ("ptqd", "mean", "none"):
            write(tmp_path, bits, correction)
    assert rows_of(tmp_path) == [
        ("w8a8", "baseline"), ("w8a8", "+ correlation, bias"), ("w8a8", "+ variance"),
        ("step_budget", "baseline"), ("step_budget", "+ correlation, bias"), ("step_budget", "+ mixed precision"),
    ]  # fmt: skip


def test_mean_and_deviation_over_seeds(tmp_path):
    for seed, fid in enumerate((1.0, 2.0, 6.0)):
        write(tmp_path, correction="ptqd", seed=seed, fid=fid, quantization={"bops_ratio": 15.973})
        write(tmp_path, "step_snr", seed=seed, quantization={"bops_ratio": 20.0 + seed})
    row, schedule = table_of(tmp_path).to_dict("records")
    assert set(TITLES) <= set(row) and row["seeds"] == "0, 1, 2"
    assert row["metrics.fid"] == 3 and row["metrics.fid.std"] == pytest.approx(math.sqrt(7))
    assert row["metrics.eps_error_percent"] == pytest.approx(2)  # 1, 2 and 3 %
    assert row["metrics.eps_error_percent.std"] == pytest.approx(1)
    assert row["metrics.psnr"] == 31 and row["quantization.bops_ratio"] == pytest.approx(15.973)
    assert pd.isna(row["quantization.bops_ratio.std"])  # the same for every seed
    assert schedule["quantization.bops_ratio.std"] == pytest.approx(1)


def test_full_precision_is_averaged_whatever_has_no_effect_on_it(tmp_path):
    write(tmp_path, "fp32", seed=0, fid=1.0)
    write(tmp_path, "fp32", correction=None, seed=1, fid=3.0)
    write(tmp_path, "w8a8")
    reference, _ = table_of(tmp_path).to_dict("records")
    assert reference["correction"] == "FP32" and reference["metrics.fid"] == 2
    missing = [key for key in TITLES if pd.isna(reference[key])]
    assert missing == ["metrics.psnr", "metrics.eps_error_percent", "quantization.bops_ratio"]


def test_runs_from_before_corrections_are_uncorrected(tmp_path):
    write(tmp_path, correction=None, seed=0)
    assert rows_of(tmp_path) == [("w4a8", "baseline")]
    write(tmp_path, correction="none", seed=1)
    write(tmp_path, correction="ptqd", seed=1)
    table = table_of(tmp_path)
    assert table["correction"].tolist() == ["baseline", "+ variance"] and table["seeds"].tolist() == ["0, 1", "1"]


def test_runs_that_differ_are_never_averaged(tmp_path):
    write(tmp_path, correction="ptqd", seed=0)
    write(tmp_path, correction="ptqd", seed=1, fid=3.0, metric_spec={"n_samples": 64})
    assert table_of(tmp_path)["metrics.fid"].tolist() == [1.0, 3.0]
    settings = {"name": "ptqd", "n_samples": 64}
    config = {"model": {"name": "digits"}, "sampler": {"name": "ddim", "eta": 1.0}, "correction": settings}
    write(tmp_path, correction="ptqd", seed=2, config=config)
    table = table_of(tmp_path)
    assert table["metrics.fid"].tolist() == [1.0, 1.0, 3.0] and table["seeds"].tolist() == ["2", "0", "1"]
    assert table["config.correction.n_samples"].tolist() == [64, 256, 256]


def test_unfinished_runs_are_shown_only_where_none_finished(tmp_path):
    write(tmp_path, seed=0)
    write(tmp_path, seed=1, fid=100.0, status="failed", metric_spec=None)
    write(tmp_path, correction="ptqd", seed=0, status="running", metrics=None)
    write(tmp_path, correction="ptqd", seed=1, status="failed", metric_spec=None)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text("{")
    table = table_of(tmp_path)
    assert table["correction"].tolist() == ["baseline", "+ variance"] and table["seeds"].tolist() == ["0", ""]
    assert table["metrics.fid"][0] == 1 and pd.isna(table["metrics.fid"][1])


def test_results_that_do_not_say_what_they_are_cannot_be_compared(tmp_path):
    write_json(tmp_path / "results.json", {"status": "failed", "seed": 0})
    with pytest.raises(DataError, match="none of the results"):
        table_of(tmp_path)
