"""Averages over seeds by hand, what must never be averaged, and the Markdown and LaTeX that come of it."""

import math
import os

import pandas as pd
import pytest

from ptq_exp.errors import ConfigError, DataError
from ptq_exp.reports.tables.tables import add_percent, aggregate, caption, collect, to_latex, to_markdown
from ptq_exp.storage.plain_json import write_json

SPEC = {"extractor": "digits", "reference": "train", "n_samples": 512}


def write(root, run, *, name="ndtc_w8a8", seed=0, fid=1.0, config=None, spec=None, **extra):
    values = {
        "name": name,
        "status": "finished",
        "seed": seed,
        "config": {"seed": seed, "logger": {"name": run}} | (config or {}),
        "metrics": {"fid": fid},
        "metric_spec": (SPEC if spec is None else spec) | {"seed": seed},
    }
    write_json(root / run / "results.json", values | extra)


def table_of(root, by=("name",), values=("metrics.fid",), **options):
    return aggregate(collect(root), list(by), list(values), **options)


def test_collect_flattens_every_run(tmp_path):
    write(tmp_path, "a/1", config={"bits": {"weight": 4}, "layers": [1, 2]}, fid=math.inf)
    write(tmp_path, "b/2", name="fp32", status="failed", error="no")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "results.json").write_text("{")
    runs = collect(tmp_path).set_index("run")
    assert list(runs.index) == ["a/1", "b/2", "c"]
    assert runs.loc["a/1", "config.bits.weight"] == 4 and runs.loc["a/1", "config.layers"] == [1, 2]
    assert runs.loc["a/1", "metrics.fid"] == math.inf and runs.loc["b/2", "error"] == "no"
    assert pd.isna(runs.loc["b/2", "config.bits.weight"]) and runs.loc["c", "status"] == "unreadable"


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no results.json"):
        collect(tmp_path)


def test_mean_and_std_over_seeds(tmp_path):
    for seed, fid in enumerate((1.0, 2.0, 6.0)):
        write(tmp_path, f"n{seed}", seed=seed, fid=fid)
    write(tmp_path, "z", name="fp32", fid=0.5)
    table = table_of(tmp_path)
    assert list(table["name"]) == ["ndtc_w8a8", "fp32"] and list(table["seeds"]) == ["0, 1, 2", "0"]
    assert table["metrics.fid"].tolist() == [3.0, 0.5]
    assert table["metrics.fid.std"][0] == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert pd.isna(table["metrics.fid.std"][1])


def test_unfinished_runs_do_not_count_but_are_shown(tmp_path):
    write(tmp_path, "a", seed=0, fid=1.0)
    write(tmp_path, "b", seed=1, fid=100.0, status="failed")
    write(tmp_path, "c", name="w4a4", fid=100.0, status="running")
    table = table_of(tmp_path)
    assert table["metrics.fid"][0] == 1.0 and table["seeds"].tolist() == ["0", ""]
    assert pd.isna(table["metrics.fid"][1])


def test_a_repeated_run_counts_once_the_newest(tmp_path):
    write(tmp_path, "z_old", fid=100.0)
    write(tmp_path, "a_new", fid=1.0)
    write(tmp_path, "b", seed=1, fid=3.0)
    os.utime(tmp_path / "z_old" / "results.json", (1, 1))
    assert table_of(tmp_path)["metrics.fid"].tolist() == [2.0]


def test_different_metric_specs_are_never_averaged(tmp_path):
    write(tmp_path, "a", seed=0, fid=1.0)
    write(tmp_path, "b", seed=1, fid=3.0)
    write(tmp_path, "c", seed=2, fid=50.0, spec=SPEC | {"n_samples": 64})
    write(tmp_path, "d", seed=3, fid=70.0, spec={key: SPEC[key] for key in ("extractor", "reference")})
    table = table_of(tmp_path)
    assert table["metrics.fid"].tolist() == [2.0, 50.0, 70.0]
    text = caption(table)
    assert "extractor digits, n_samples 512, reference train; seeds 0, 1." in text
    assert "n_samples 64" in text and len(text.splitlines()) == 3


def test_runs_with_other_settings_are_never_averaged(tmp_path):
    write(tmp_path, "a", seed=0, config={"metric": "lp"})
    write(tmp_path, "b", seed=1, config={"metric": "kl"}, fid=3.0)
    with pytest.raises(ConfigError, match="differ in config.metric"):
        table_of(tmp_path)
    assert table_of(tmp_path, by=("name", "config.metric"))["metrics.fid"].tolist() == [1.0, 3.0]
    assert table_of(tmp_path, ignore=("seed", "logger", "metric"))["metrics.fid"].tolist() == [2.0]


def test_a_setting_that_only_some_runs_have_is_a_difference(tmp_path):
    write(tmp_path, "a", seed=0)
    write(tmp_path, "b", seed=1, config={"correction": "ptqd"})
    with pytest.raises(ConfigError, match="config.correction"):
        table_of(tmp_path)
    assert len(table_of(tmp_path, by=("name", "config.correction"))) == 2  # missing is a group of its own


def test_runs_from_before_labels_are_averaged_with_paired_ones_alone(tmp_path):
    write(tmp_path, "old", seed=0, config={"calibration": {"name": "ndtc"}}, fid=1.0)
    now = {"calibration": {"name": "ndtc", "labels": "paired"}, "imports": ["mine"]}
    write(tmp_path, "new", seed=1, config=now, fid=3.0)
    assert table_of(tmp_path).loc[0, "metrics.fid"] == 2.0
    write(tmp_path, "other", seed=2, config={"calibration": {"name": "ndtc", "labels": "reversed"}})
    with pytest.raises(ConfigError, match="differ in config.calibration.labels"):
        table_of(tmp_path)


def test_unknown_columns_are_named(tmp_path):
    write(tmp_path, "a")
    with pytest.raises(ConfigError, match="'nome'.*metrics.fid"):
        table_of(tmp_path, by=("nome",))
    with pytest.raises(ConfigError, match="'fidd'"):
        to_markdown(table_of(tmp_path), {"fidd": "FID"})


def test_markdown(tmp_path):
    write(tmp_path, "a", seed=0, fid=1.0, quantization={"coverage": 0.99})
    write(tmp_path, "b", seed=1, fid=2.0, quantization={"coverage": 0.99})
    write(tmp_path, "c", name="fp|32", fid=math.inf)
    table = table_of(tmp_path, values=("metrics.fid", "quantization.coverage", "metrics.nothing"))
    titles = {"name": "run", "seeds": "seeds", "metrics.fid": "FID", "quantization.coverage": "coverage"}
    assert to_markdown(table, titles | {"metrics.nothing": "?"}, digits=2) == (
        "| run | seeds | FID | coverage | ? |\n"
        "| --- | --- | ---: | ---: | ---: |\n"
        "| ndtc_w8a8 | 0, 1 | 1.50 ± 0.71 | 0.99 ± 0.00 | — |\n"
        "| fp\\|32 | 0 | ∞ | — | — |\n"
    )
    assert to_markdown(table).splitlines()[0].startswith("| name | metric_spec | seeds | metrics.fid | quant")


def test_latex(tmp_path):
    write(tmp_path, "a", seed=0, fid=1.0, quantization={"coverage": 0.99})
    write(tmp_path, "b", seed=1, fid=2.0, quantization={"coverage": 0.99})
    write(tmp_path, "c", name="fp|32", fid=-math.inf)
    table = table_of(tmp_path, values=("metrics.fid", "quantization.coverage", "metrics.nothing"))
    titles = {"name": "run", "metrics.fid": "FID_1", "quantization.coverage": "coverage %", "metrics.nothing": "?"}
    assert to_latex(table, titles, digits=2) == (
        "\\begin{tabular}{lrrr}\n"
        "\\toprule\n"
        "run & FID\\_1 & coverage \\% & ? \\\\\n"
        "\\midrule\n"
        "ndtc\\_w8a8 & $1.50 \\pm 0.71$ & $0.99 \\pm 0.00$ & -- \\\\\n"
        "fp|32 & $-\\infty$ & -- & -- \\\\\n"
        "\\bottomrule\n"
        "\\end{tabular}\n"
    )


def test_latex_floats_with_a_caption_and_rules_off_its_blocks():
    table = pd.DataFrame({"model": ["a", "a", "b"], "bits": [8, 4, 4], "ok": [True, False, True]})
    text = to_latex(table, caption="50 % of n_samples & more", label="tab:n_1", blocks=["model"])
    lines = text.splitlines()
    assert lines[:4] == [
        r"\begin{table}", r"\centering", r"\caption{50 \% of n\_samples \& more}", r"\label{tab:n_1}",
    ]  # fmt: skip
    assert lines[7:] == [
        r"\midrule", r"a & $8$ & True \\", r"a & $4$ & False \\", r"\midrule", r"b & $4$ & True \\", r"\bottomrule",
        r"\end{tabular}", r"\end{table}",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="'bit'.*model"):
        to_latex(table, blocks=["bit"])


def test_latex_escapes_every_character_of_its_own():
    table = pd.DataFrame({"x": ["%_&#${}", "a\\b~c^d", "<1±2>"]})
    assert to_latex(table).splitlines()[4:7] == [
        r"\%\_\&\#\$\{\} \\",
        r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d \\",
        r"\textless{}1$\pm$2\textgreater{} \\",
    ]


def test_percent_of_a_share_that_may_be_missing():
    runs = add_percent(pd.DataFrame({"a": [0.5, math.nan]}), {"a_percent": "a", "b_percent": "b"})
    assert runs["a_percent"][0] == 50 and runs[["a_percent", "b_percent"]].isna().sum().tolist() == [1, 2]
