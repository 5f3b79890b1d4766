"""The coordinate search: decisions by hand, files by hand, and one real search in small."""

import shlex

import pytest
import yaml
from hydra import compose, initialize_config_dir

from ptq_exp.cli.coordinate_search import Search, Space, Stage, merged
from ptq_exp.cli.search import experiment_file, main
from ptq_exp.errors import ConfigError, PTQError
from ptq_exp.settings.compose import config_folder, validated


def space(direction: str = "maximize", tolerance: float = 0.0) -> Space:
    stages = (Stage("one", ["", "a=1", "a=2"]), Stage("two", ["b=1", "b=2 a=1"]))
    return Space("score", direction, tolerance, (7, 8), ("base=1",), stages)


def table(values: dict) -> callable:
    """A run whose score is a look-up by (a, b), plus the seed / 10: means over seeds 7 and 8 are value + 0.75."""

    def run(overrides):
        given = dict(one.split("=") for one in overrides)
        value = values[given.get("a", "0"), given.get("b", "1")]
        if isinstance(value, str):
            return {"error": value}
        return {"metrics": {"score": value + int(given["seed"]) / 10}}

    return run


SCORES = {("0", "1"): 1.0, ("1", "1"): 3.0, ("2", "1"): 2.0, ("1", "2"): 5.0}


def test_each_stage_keeps_its_best_and_passes_it_on():
    search = Search(space(), table(SCORES))
    assert search.best() == ("b=2", "a=1")  # the value that was decided first is replaced by the later one
    assert [(t.stage, t.candidate, t.chosen) for t in search.trials] == [
        ("one", "(nothing)", False), ("one", "a=1", True), ("one", "a=2", False),
        ("two", "b=1", False), ("two", "b=2 a=1", True),
    ]
    assert search.trials[1].metrics == {"score": pytest.approx(3.75)}
    assert search.trials[0].overrides == ("base=1",)


def test_minimize():
    assert Search(space("minimize"), table(SCORES)).best() == ("b=1",)


@pytest.mark.parametrize(("tolerance", "expected"), [(0.9, ("a=1", "b=1")), (2.1, ("b=1",))])
def test_a_later_candidate_must_be_better_by_more_than_the_tolerance(tolerance, expected):
    scores = SCORES | {("1", "2"): 3.05}
    assert Search(space(tolerance=tolerance), table(scores)).best() == expected


def test_a_failed_candidate_loses_and_says_why():
    search = Search(space("minimize"), table(SCORES | {("0", "1"): "refused: set x=1"}))
    assert search.best() == ("a=2", "b=1")
    assert search.trials[0].error == "refused: set x=1"
    assert search.trials[0].metrics == {}


def test_a_stage_without_a_number_ends_the_search():
    with pytest.raises(PTQError, match="stage one of the search: no candidate gave score: refused"):
        Search(space(), table(dict.fromkeys(SCORES, "refused"))).best()


def test_fixed_settings_win_over_the_base_and_parallel_trials_change_nothing():
    search = Search(space(), table(SCORES), fixed=("base=2",), jobs=3)
    assert search.best() == ("b=2", "a=1")
    assert all("base=2" in trial.overrides and "base=1" not in trial.overrides for trial in search.trials)


def test_later_overrides_replace_earlier_ones_and_a_group_takes_its_settings_along():
    first = ("reconstruction=brecq", "reconstruction.lr=0.1", "metric=mse", "reconstructions=1")
    assert merged(first, ("metric=lp",)) == (
        "reconstruction=brecq", "reconstruction.lr=0.1", "reconstructions=1", "metric=lp",
    )
    assert merged(first, ("reconstruction=none",)) == ("metric=mse", "reconstructions=1", "reconstruction=none")


def test_a_search_may_end_early():
    assert Search(space().until("one"), table(SCORES)).best() == ("a=1",)
    with pytest.raises(ConfigError, match="no stage three in the search: choose one of one, two"):
        space().until("three")


def test_experiment_file_by_hand():
    decided = ("quantization.shortcut=split", "metric=mse", "reconstruction=brecq", "reconstruction.step_lr=0.01")
    text = experiment_file(decided, "best_${bits.name}", "Found by\na search.", ["metric", "reconstruction"])
    assert text.startswith("# @package _global_\n# Found by\n# a search.\n")
    assert yaml.safe_load(text) == {
        "defaults": [{"override /metric": "mse"}, {"override /reconstruction": "brecq"}],
        "name": "best_${bits.name}",
        "quantization": {"shortcut": "split"},
        "reconstruction": {"step_lr": 0.01},
    }


GOOD = {"objective": "psnr", "direction": "maximize", "tolerance": 0, "seeds": [1], "base": [],
        "stages": [{"name": "s", "candidates": ["", "a=1 b=2"]}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direction": "up"}, "direction=up: choose one of maximize, minimize"),
        ({"seeds": []}, "seeds and stages need an entry each"),
        ({"seeds": ["x"]}, "invalid literal"),
        ({"stages": [{"name": "s"}]}, "expected the settings name, candidates, found name"),
        ({"stages": [{"name": "s", "candidates": []}]}, "stage s has no candidates"),
        ({"stages": [{"name": "s", "candidates": ["w4a8"]}]}, "expected overrides such as bits=w4a8"),
        ({"extra": 1}, "expected the settings objective, direction"),
    ],
)
def test_a_wrong_space_is_named(tmp_path, change, message):
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(GOOD | change))
    with pytest.raises(ConfigError, match=f"{path.name}.*{message}"):
        Space.load(path)


def test_unreadable_spaces(tmp_path):
    with pytest.raises(ConfigError, match="no readable YAML"):
        Space.load(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="no readable YAML"):
        Space.load(tmp_path / "broken.yaml")


def test_every_candidate_of_the_shipped_space_composes():
    shipped = Space.load(config_folder() / "search" / "best.yaml")
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        for stage in shipped.stages:
            for candidate in stage.candidates:
                for bits in ("bits=w8a8", "bits=w4a4"):
                    validated(compose("config", overrides=list(merged(shipped.base, [bits], shlex.split(candidate)))))


def test_a_real_search_in_small(tmp_path, capsys):
    path = tmp_path / "tiny.yaml"
    base = ["calibration=uniform", "sampler.steps=2", "calibration.n_samples=4", "evaluation.n_samples=4",
            "evaluation.eps_error_samples=2", "evaluation.grid_images=2", "evaluation.fid_resamples=2",
            f"cache_dir={tmp_path / 'cache'}",
            "logger=none", "save_quantized=false"]
    stages = [{"name": "metric", "candidates": ["metric=minmax", "metric=mse"]},
              {"name": "eta", "candidates": ["", "sampler.eta=7"]}]
    path.write_text(yaml.safe_dump(GOOD | {"base": base, "seeds": [3], "stages": stages}))
    arguments = ["bits=w4a4", "--space", str(path), "--folder", str(tmp_path / "out")]
    main(arguments)
    said = capsys.readouterr().out
    assert "sampler.eta=7.0: choose 0..1" in said
    trials = sorted((tmp_path / "out" / "trials").glob("*/results.json"))
    before = [trial.stat().st_mtime_ns for trial in trials]
    assert len(trials) == 2
    main(arguments)  # again: nothing that had finished is run
    assert [trial.stat().st_mtime_ns for trial in trials] == before
    assert capsys.readouterr().out == said
    found = yaml.safe_load((tmp_path / "out" / "experiment.yaml").read_text())
    assert found["defaults"][-1] == {"override /bits": "w4a4"} and found["name"] == "tiny_${bits.name}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["metric=mse"], "no bits among"), (["bits=w4a8", "--jobs", "0"], "--jobs=0"),
     (["bits=w4a8", "--space", "nothing"], "nothing.yaml is no readable")],
)
def test_the_command_refuses(arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(arguments)
