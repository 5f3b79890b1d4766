"""The layout `ablation`: its rows, their names and their order, averages by hand, and what is never averaged."""

import pandas as pd
import pytest

from ptq_exp.cli.table import layout_table
from ptq_exp.errors import DataError
from ptq_exp.storage.plain_json import write_json


@pytest.fixture
def write(tmp_path, write_run):
    """Write a run as an experiment leaves it."""

    def run(bits="w4a8", correction="none", seed=0, *, model="digits", eta=1.0, name=None, metrics=None, **extra):
        config = {"model": {"name": model}, "sampler": {"eta": eta}, "correction": {"name": correction}}
        config |= {"name": f"{correction}_{bits}"} | extra.pop("config", {})
        folder = tmp_path / (name or f"{model}_{eta}_{bits}_{correction}_{seed}")
        write_run(folder, bits, "uniform", seed, config=config, metrics={"fid": 1.0} | (metrics or {}), **extra)

    return run


def table_of(root):
    return layout_table(str(root), "ablation")


def rows_of(root, *columns):
    return list(table_of(root).frame[list(columns)].itertuples(index=False, name=None))


def test_rows_stand_in_the_order_of_the_parts(tmp_path, write):
    for correction in ("ptqd", "none", "mean", "correlation", "bias", "another"):
        write(correction=correction)
    parts = ["baseline", "+ bias", "+ correlation", "+ correlation, bias", "+ variance", "another"]
    assert rows_of(tmp_path, "bits", "correction") == [("w4a8", part) for part in parts]


def test_blocks_stand_in_the_order_of_model_eta_and_bits_after_full_precision(tmp_path, write):
    for bits in ("step_snr", "w3a8", "fp32", "w8a8", "w4a8"):
        write(bits)
    write("w8a8", eta=0.0)
    write("w8a8", model="another")
    assert rows_of(tmp_path, "model", "sampler.eta", "bits") == [
        ("another", "1", "w8a8"), ("digits", "0", "w8a8"), ("digits", "1", "FP32"), ("digits", "1", "w8a8"),
        ("digits", "1", "w4a8"), ("digits", "1", "w3a8"), ("digits", "1", "step_snr"),
    ]


def test_a_bit_schedule_ends_in_mixed_precision(tmp_path, write):
    for bits in ("step_budget", "w8a8"):
        for correction in ("ptqd", "mean", "none"):
            write(bits, correction)
    assert rows_of(tmp_path, "bits", "correction") == [
        ("w8a8", "baseline"), ("w8a8", "+ correlation, bias"), ("w8a8", "+ variance"),
        ("step_budget", "baseline"), ("step_budget", "+ correlation, bias"), ("step_budget", "+ mixed precision"),
    ]


def test_mean_and_deviation_over_seeds(tmp_path, write):
    for seed, fid in enumerate((1.0, 2.0, 6.0)):
        metrics = {"fid": fid, "eps_error": 0.01 * (1 + seed)}
        write(correction="ptqd", seed=seed, metrics=metrics, quantization={"bops_ratio": 15.973})
        write("step_snr", seed=seed, quantization={"bops_ratio": 20.0 + seed})
    table = table_of(tmp_path)
    row, schedule = table.frame.to_dict("records")
    assert table.rows == [(False, "0, 1, 2")] * 2
    assert row["fid"] == 3 and row["fid.std"] == pytest.approx(7**0.5)
    assert row["eps_error_percent"] == pytest.approx(2) and row["eps_error_percent.std"] == pytest.approx(1)
    assert row["bops_ratio"] == pytest.approx(15.973) and pd.isna(row["bops_ratio.std"])  # the same for every seed
    assert schedule["bops_ratio.std"] == pytest.approx(1)


def test_full_precision_is_averaged_whatever_has_no_effect_on_it(tmp_path, write):
    write("fp32", seed=0)
    write("fp32", "bias", seed=1, metrics={"fid": 3.0})
    write("w8a8")
    assert table_of(tmp_path).frame["fid"].tolist() == [2.0, 1.0]


def test_runs_that_differ_are_never_averaged(tmp_path, write):
    write(correction="ptqd", seed=0)
    write(correction="ptqd", seed=1, metrics={"fid": 3.0}, spec={"n_samples": 64})
    table = table_of(tmp_path)
    assert table.frame["fid"].tolist() == [1.0, 3.0] and table.frame["scored"].tolist() == ["(a)", "(b)"]
    write(correction="ptqd", seed=2, config={"correction": {"name": "ptqd", "n_samples": 64}})
    frame = table_of(tmp_path).frame
    assert frame["correction.n_samples"].tolist().count("64") == 1 and len(frame) == 3


def test_runs_from_before_corrections_are_uncorrected(tmp_path, run_values):
    values = run_values("w4a8")
    del values["config"]["correction"], values["config"]["reconstruction"]
    write_json(tmp_path / "old" / "results.json", values)
    assert rows_of(tmp_path, "bits", "correction") == [("w4a8", "baseline")]


def test_unfinished_runs_have_a_row_only_where_none_finished(tmp_path, write):
    write(seed=0)
    write(seed=1, metrics={"fid": 100.0}, status="failed")
    write(correction="ptqd", seed=0, status="running")
    frame = table_of(tmp_path).frame
    assert frame["correction"].tolist() == ["baseline", "+ variance"]
    assert frame["fid"][0] == 1 and pd.isna(frame["fid"][1])


def test_results_that_do_not_say_what_they_are_cannot_be_compared(tmp_path):
    write_json(tmp_path / "results.json", {"status": "failed", "seed": 0})
    with pytest.raises(DataError, match="none of the runs says"):
        table_of(tmp_path)
