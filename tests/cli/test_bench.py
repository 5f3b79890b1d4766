"""`python -m ptq_exp bench`: settings as words, a table, numbers in a file, and errors in one line."""

import json
import zipfile
from pathlib import Path

import pytest
import torch

from ptq_exp.cli import bench
from ptq_exp.errors import ConfigError
from ptq_exp.reports.runtime import markdown
from ptq_exp.runtime import RUNTIMES

GOLDEN = Path(__file__).parents[1] / "golden" / "saved_model_1.zip"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "bench needs quantized=PATH"),
        (["quantized=a", "runtme=all"], "runtme=all: choose from quantized=, runtime="),
        (["quantized=a", "batch=2", "batch=3"], "batch=3: is given twice"),
        (["quantized=a", "threads=1,0"], "threads=0: choose 1..4096"),
        (["quantized=a", "batch=1,2"], "batch=1,2: choose one number"),
        (["quantized=a", "memory=yes"], "memory=yes: choose true or false"),
        (["quantized=a", "runtime=simulate"], "runtime=simulate: choose one of all, openvino"),
        (["-x"], None),
    ],
)
def test_what_is_misspelt_ends_in_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main(words)
    if message is not None:
        assert str(ended.value).startswith(f"error: {message}")


def test_the_words_are_those_of_experiments(monkeypatch):
    given = bench.settings_of(["quantized='~/a b'", "threads=[1,2]", "runtime=openvino", "batch=4"])
    assert given["quantized"].endswith("a b") and not given["quantized"].startswith("~")
    assert (given["threads"], given["runtime"], given["batch"], given["memory"]) == ([1, 2], ["openvino"], 4, False)
    assert bench.settings_of(["quantized=a"])["runtime"] == [name for name in RUNTIMES if name != "simulate"]
    with pytest.raises(ConfigError):
        bench.settings_of(["quantized="])


def test_a_saved_model_is_timed(tmp_path, capsys):
    with zipfile.ZipFile(GOLDEN) as archive:
        archive.extractall(tmp_path)
    threads = torch.get_num_threads()
    words = [f"quantized={tmp_path / 'quantized'}", f"checkpoint={tmp_path / 'model'}", "runtime=openvino", "threads=1"]
    bench.main([*words, "batch=2", "repeats=1", f"json={tmp_path / 'out.json'}", f"cache_dir={tmp_path / 'cache'}"])
    assert torch.get_num_threads() == threads
    found = json.loads((tmp_path / "out.json").read_text())
    (row,) = found["rows"]
    kinds = {"f32", "bf16", "int8", "int8_bf16"}
    assert set(row["ms_per_evaluation"]) == {"torch_fp32", "simulation", *(f"openvino_{kind}" for kind in kinds)}
    assert row["engine"] == "openvino" and 0.8 < row["int8_share"] < 1 and row["file_bytes"] > 0
    assert row["repeats"] == 1 and row["saturation"] == pytest.approx(1, abs=1e-6)
    shown = capsys.readouterr().out.splitlines()
    assert shown == markdown(found).splitlines()
    assert shown[0].startswith("| network | params | batch | engine | thr. |")
    assert {line.count("|") for line in shown[:3]} == {shown[0].count("|")}


def test_a_column_that_was_not_measured_is_a_dash():
    row = {
        "engine": "torch", "version": "2", "threads": 1, "int8_share": 0.5, "attention_int8_share": None, "repeats": 3,
        "ms_per_evaluation": {"simulation": 30.0, "torch_int8": 10.0}, "faster_than": {"simulation": 3.0},
    }
    text = markdown({"network": "small", "parameters": 1_600_000, "batch": 8, "rows": [row]}).splitlines()
    assert text[2] == "| small | 1.6 M | 8 | torch | 1 | - | 30.0 | - | - | **10.0** | - | - | - | - |"
    assert text[-1] == "torch 2; 50.00% of the MACs of its layers as int8."
    row |= {"peak_bytes": {"torch_f32": 4e6, "torch_int8": 1e6}}
    cells = markdown({"network": "small", "parameters": 1_600_000, "batch": 8, "rows": [row]}).splitlines()[2]
    assert cells.endswith("| 4 / - / 1 | 0.25 |")
