"""What tells runs apart: one list of settings without effect for all tables, and nothing lost in silence."""

import os

import pytest
from markdown_text import squeezed

from ptq_exp.cli.sweep.job import _deciding
from ptq_exp.cli.sweep.resume import _changes_jobs
from ptq_exp.cli.table import layout_table, main, make_table
from ptq_exp.errors import ConfigError
from ptq_exp.reports.html.sweep import compared
from ptq_exp.reports.tables.identity import has_effect, newest, telling_apart
from ptq_exp.reports.tables.render import render
from ptq_exp.reports.tables.request import Request
from ptq_exp.reports.tables.runs import collect, gather
from ptq_exp.storage.plain_json import read_json, write_json

LAYOUTS = ("experiments", "ablation")
SPEC = {"extractor": "e", "n_samples": 4, "reference": "r"}
WITHOUT_EFFECT = {
    "imports": ["mine"], "cache": "off", "cache_dir": "/tmp/c", "save_quantized": False,
    "analysis": {"active": True}, "logger": {"mode": "none"}, "trainer": {"threads": 3},
}


def write(root, run, fid=1.0, seed=0, status="finished", name="ndtc_w8a8", spec=SPEC, age=0, **settings):
    config = {
        "name": name, "seed": seed, "imports": [], "save_quantized": True, "model": {"name": "digits"},
        "sampler": {"name": "ddim", "steps": 4, "eta": 0.0}, "bits": {"name": "w8a8"}, "metric": {"name": "mse"},
        "correction": {"name": "none"},
    }
    for key, value in settings.items():
        config[key] = config.get(key, {}) | value if isinstance(value, dict) else value
    values = {"name": name, "status": status, "seed": seed, "config": config, "metrics": {"fid": fid},
              "metric_spec": spec | {"seed": seed}}
    path = root / run / "results.json"
    write_json(path, values)
    os.utime(path, (1e9 - age, 1e9 - age))


def by_name(runs):
    return make_table(runs, Request(rows=["name"], values=["fid"]))


@pytest.mark.parametrize(("key", "value"), WITHOUT_EFFECT.items())
def test_a_setting_without_effect_is_none_for_every_table(tmp_path, key, value):
    write(tmp_path, "a", fid=1.0)
    write(tmp_path, "b", fid=3.0, seed=1, **{key: value})
    runs = gather([tmp_path])
    for table in (by_name(runs), compared(runs), *(layout_table(runs, name) for name in LAYOUTS)):
        assert table.frame["fid"].tolist() == [2.0]
    assert not has_effect(key) and not has_effect(f"{key}.inner")
    assert _deciding({key: value, "seed": 0}) == {"seed": 0}
    assert not _changes_jobs(f"{key}.inner") and not _changes_jobs(key)


RUNTIME = {"name": "simulate", "precision": "f32", "weights": "as_saved", "regrid": False}


def test_a_run_of_before_there_were_runtimes_is_one_of_the_simulation(tmp_path):
    write(tmp_path, "old", fid=1.0)
    write(tmp_path, "new", fid=3.0, seed=1, runtime=RUNTIME)
    runs = gather([tmp_path])
    for table in (by_name(runs), compared(runs), *(layout_table(runs, name) for name in LAYOUTS)):
        assert table.frame["fid"].tolist() == [2.0]
    by_runtime = make_table(runs, Request(rows=["runtime"], values=["fid"])).frame
    assert by_runtime["runtime"].tolist() == ["simulate"] and by_runtime["fid"].tolist() == [2.0]
    settings = {"seed": 0, "bits": {"name": "w8a8"}}
    assert _deciding(settings) == _deciding(settings | {"runtime": RUNTIME})
    assert _deciding(settings) != _deciding(settings | {"runtime": RUNTIME | {"name": "openvino"}})


@pytest.mark.parametrize(("option", "value"), [("precision", "bf16"), ("weights", "7bit"), ("regrid", True)])
def test_options_of_a_runtime_tell_runs_apart(tmp_path, option, value):
    engine = RUNTIME | {"name": "openvino"}
    for seed, runtime in enumerate((engine, engine | {option: value})):
        write(tmp_path, f"{seed}", fid=float(seed), seed=seed, runtime=runtime)
    with pytest.raises(ConfigError, match=f"differ in runtime.{option}"):
        by_name(gather([tmp_path]))
    assert _deciding({"runtime": engine}) != _deciding({"runtime": engine | {option: value}})


def test_a_name_changes_no_numbers_but_the_folders_of_jobs():
    assert not has_effect("name") and _changes_jobs("name") and not _changes_jobs("hydra/launcher")


@pytest.mark.parametrize(
    "key", ["model.build.seed", "model.images.cache", "calibration.distribution.name", "bits.name"]
)
def test_only_a_whole_setting_is_without_effect_not_a_word_in_it(key):
    assert has_effect(key) and _changes_jobs(key)


@pytest.mark.parametrize(
    ("column", "settings"),
    [
        ("sampler.steps", {"sampler": {"steps": 6}}), ("model", {"model": {"name": "digits_ldm"}}),
        ("model.build.seed", {"model": {"build": {"seed": 1}}}), ("bits.candidates", {"bits": {"candidates": [4, 8]}}),
        ("quantized", {"quantized": "runs/a"}), ("quantization.smooth", {"quantization": {"smooth": True}}),
    ],
)
@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)])
def test_runs_of_one_name_that_differ_have_rows_of_their_own(tmp_path, column, settings, seeds):
    write(tmp_path, "a", fid=1.0, seed=seeds[0], age=5)
    write(tmp_path, "b", fid=3.0, seed=seeds[1], **settings)
    for table in (compared(collect(tmp_path)), *(layout_table(tmp_path, name) for name in LAYOUTS)):
        assert sorted(table.frame["fid"]) == [1.0, 3.0] and column in table.keys
    with pytest.raises(ConfigError, match=f"would be averaged but differ in {column}"):
        by_name(gather([tmp_path]))


def test_other_weights_under_the_same_path_have_a_row_of_their_own(tmp_path):
    """A checkpoint that was trained on, or exchanged: the path says nothing of it, the digest does."""
    for seed, digest in enumerate(("aaaa", "aaaa", "bbbb")):
        write(tmp_path, str(seed), fid=1.0 + 2 * seed, seed=seed, model={"name": "mine", "checkpoint": "m.pt"})
        path = tmp_path / str(seed) / "results.json"
        write_json(path, read_json(path) | {"weights": {"model": digest}})
    for table in (compared(collect(tmp_path)), *(layout_table(tmp_path, name) for name in LAYOUTS)):
        assert sorted(table.frame["fid"]) == [2.0, 5.0] and "model.weights" in table.keys
    with pytest.raises(ConfigError, match="would be averaged but differ in model.weights"):
        by_name(gather([tmp_path]))


def test_runs_that_were_scored_differently_have_letters(tmp_path):
    write(tmp_path, "a", fid=1.0)
    write(tmp_path, "b", fid=3.0, spec=SPEC | {"reference": "another"})
    text = squeezed(render(layout_table(tmp_path, "experiments")))
    assert "| mse | (a) | 1.00 |" in text and "| mse | (b) | 3.00 |" in text
    assert "(a) extractor e, n_samples 4, reference r; seed 0" in text and "(b) extractor e" in text
    frame = compared(collect(tmp_path)).frame
    assert frame["scored"].tolist() == ["(a)", "(b)"] and frame["fid"].tolist() == [1.0, 3.0]


def test_what_is_left_out_is_named_below_every_table(tmp_path, capsys):
    write(tmp_path, "old", fid=9.0, age=10)
    write(tmp_path, "new", fid=1.0)
    write(tmp_path, "half", seed=1, status="running")
    write(tmp_path, "stopped", seed=2, status="interrupted")
    write(tmp_path, "nan", seed=3, fid=float("nan"))
    write_json(tmp_path / "foreign" / "results.json", {"status": "finished"})
    lost = ("not old", "unfinished: half", "interrupted: stopped", "no experiments, left out: foreign", "no FID in nan")
    for form in ("markdown", "latex"):
        for table in (render(layout_table(tmp_path, name), form) for name in LAYOUTS):
            assert [part for part in lost if part not in table] == []
    main([str(tmp_path), "--format", "csv"])
    printed = capsys.readouterr().err
    assert [part for part in lost if part not in printed] == []
    assert any("not old" in note for note in compared(collect(tmp_path)).notes)
    main([str(tmp_path)])
    assert "several runs of one configuration and seed: the newest counts, not old" in capsys.readouterr().out


def test_full_precision_runs_do_not_differ_in_what_has_no_effect_on_them(tmp_path):
    write(tmp_path, "a", fid=1.0, name="fp32", bits={"name": "fp32"}, calibration={"name": "ndtc"})
    write(tmp_path, "b", fid=3.0, seed=1, name="fp32", bits={"name": "fp32"}, calibration={"name": "raw"})
    write(tmp_path, "c", fid=7.0, name="fp32", bits={"name": "fp32"}, sampler={"steps": 6})
    text = squeezed(render(layout_table(tmp_path, "experiments")))
    assert "| FP32 | | 4 | 2.00 ± 1.41 |" in text and "| FP32 | | 6 | 7.00 (n=1) |" in text


def test_as_few_settings_as_tell_all_apart(tmp_path):
    for i, (model, steps) in enumerate([("digits", 4), ("digits_ldm", 6), ("digits_ldm", 8)]):
        write(tmp_path, str(i), model={"name": model, "dtype": model}, sampler={"steps": steps})
    assert telling_apart(collect(tmp_path), ["name"]) == ["config.model.name", "config.sampler.steps"]
    assert telling_apart(collect(tmp_path).iloc[:2], ["name"]) == ["config.model.name"]


def test_of_repeated_runs_the_newest_is_kept_whatever_their_order(tmp_path):
    for i, age in enumerate((5, 0, 9)):
        write(tmp_path, f"r{i}", age=age)
    kept, notes = newest(collect(tmp_path), ["seed"])
    assert kept["run"].tolist() == ["r1"] and notes[0].endswith("not r0, r2")


def test_jobs_of_two_sweeps_are_called_by_their_folders(tmp_path):
    for sweep in ("x", "y"):
        write(tmp_path / sweep, "0_ndtc")
    names = gather([tmp_path / "x", tmp_path / "y"])["run"]
    assert len(set(names)) == 2 and all(name.endswith("0_ndtc") for name in names)
