"""The layouts of `conf/table`: each composes, is filled by its own command, and prints."""

import shlex

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from quick_yaml import quick_yaml

from ptq_exp.cli.table import layout_list, layout_table
from ptq_exp.reports.tables.layouts import layouts
from ptq_exp.settings.compose import config_folder, validated
from ptq_exp.settings.names import setting_names
from ptq_exp.storage.plain_json import to_plain, write_json

LAYOUTS = {layout.name: layout for layout in layouts(config_folder() / "table")}


def test_the_tables_of_the_papers_are_there():
    assert set(LAYOUTS) >= {
        "ptq4dm_operations", "ptq4dm_calibration", "ptq4dm_timesteps", "ptq4dm_metric", "di2n_main", "ptqd_main",
        "ptqd_correction", "experiments", "ablation",
    }
    text = layout_list()
    for layout in LAYOUTS.values():
        assert layout.name in text and layout.request.title in text and layout.command[0] in text


def jobs(command: str) -> list[list[str]]:
    """The overrides of each job of a sweep, of seed 0 alone."""
    python, *module, flag = shlex.split(command)[:4]
    assert [python, *module, flag] == ["python", "-m", "ptq_exp", "-m"]
    found: list[list[str]] = [[]]
    for override in OverridesParser.create().parse_overrides(shlex.split(command)[4:]):
        values = list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.value()]
        values = values[:1] if override.key_or_group == "seed" else values
        prefix = "+" if override.is_add() else ""
        found = [[*job, f"{prefix}{override.key_or_group}={value}"] for job in found for value in values]
    return found


def composed(overrides):
    with quick_yaml(), initialize_config_dir(str(config_folder()), version_base="1.3"):
        return validated(compose("config", overrides=overrides))


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_command_of_a_layout_fills_it(name, tmp_path):
    layout = LAYOUTS[name]
    configs = [to_plain(composed(job)) for command in layout.command for job in jobs(command)]
    for number, config in enumerate(configs):
        values = {
            "name": config["name"], "status": "finished", "seed": config["seed"], "config": config,
            "metrics": {"fid": float(number), "is": 9.0}, "metric_spec": {"extractor": "e"},
        }
        write_json(tmp_path / str(number) / "results.json", values)
    # every job passes the filter and has a cell of its own: none is averaged with another, left out or repeated
    table = layout_table(str(tmp_path), name)
    column = table.frame["fid"]
    assert sorted(column.dropna()) == [float(number) for number in range(len(configs))]
    assert not [note for note in table.notes if "newest" in note or "no experiments" in note]
    # published figures are there and stand in rows that full precision and quantized runs of that model would have
    published = [head for head in table.frame if head.startswith("published ")]
    assert bool(published) == bool(layout.request.published) and table.frame[published].notna().any().all()
    assert set(layout.request.where) | set(layout.request.rows) <= {
        name.removesuffix(".name") for name in setting_names()
    } | {"calibration.distribution.mean"}


def test_published_figures_meet_the_runs_of_the_published_model(tmp_path):
    config = to_plain(composed(["+experiment=ndtc_w8a8", "metric=kl", "model=ddim_imagenet64"]))
    values = {"name": "n", "status": "finished", "seed": 0, "config": config, "metrics": {"fid": 40.0}}
    write_json(tmp_path / "results.json", values)
    frame = layout_table(str(tmp_path), "ptq4dm_metric").frame.set_index("metric")
    assert frame.loc["kl", ["model", "fid", "published PTQ4DM/fid"]].tolist() == ["ddim_imagenet64", 40.0, 47.27]
    assert frame.loc["l1", "published PTQ4DM/is"] == 7.38 and frame.loc["FP32", "published PTQ4DM/sfid"] == 17.66
