"""Runs collected from folders."""

import math

import pandas as pd
import pytest

from ptq_exp.errors import DataError
from ptq_exp.reports.tables.runs import collect


def test_collect_flattens_every_run(tmp_path, write_run):
    write_run(tmp_path / "a/1", config={"bits": {"weight": 4}, "quantized": [1, 2]}, metrics={"fid": math.inf})
    write_run(tmp_path / "b/2", status="failed", error="no")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "results.json").write_text("{")
    runs = collect(tmp_path).set_index("run")
    assert list(runs.index) == ["a/1", "b/2", "c"]
    assert runs.loc["a/1", "config.bits.weight"] == 4 and runs.loc["a/1", "config.quantized"] == [1, 2]
    assert runs.loc["a/1", "metrics.fid"] == math.inf and runs.loc["b/2", "error"] == "no"
    assert pd.isna(runs.loc["b/2", "config.bits.weight"]) and runs.loc["c", "status"] == "unreadable"


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no results.json"):
        collect(tmp_path)
