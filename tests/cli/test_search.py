"""The coordinate search: decisions by hand, files by hand, and one real search in small."""

import itertools
import math
import shlex
from dataclasses import replace

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_dir
from quick_yaml import quick_yaml

from ptq_exp.cli.coordinate_search import Search, merged
from ptq_exp.cli.search import experiment_file, main, markdown
from ptq_exp.cli.search_space import Space, Stage
from ptq_exp.errors import ConfigError, PTQError
from ptq_exp.evaluation.bootstrap import paired_bootstrap
from ptq_exp.settings.compose import config_folder, validated
from ptq_exp.storage.plain_json import read_json


def space(direction: str = "maximize", tolerance: float = 0.0) -> Space:
    stages = (Stage("one", ["", "a=1", "a=2"]), Stage("two", ["b=1", "b=2 a=1"]))
    return Space("score", direction, (7, 8), ("base=1",), stages, tolerance=tolerance)


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


def conditional(least: float = 0.995, shares: dict | None = None, path: str = "runtime.int8_share") -> Search:
    """A search under one condition; `shares` holds runtime.int8_share by (a, b), for each of the two seeds."""

    def run(overrides):
        given = dict(one.split("=") for one in overrides)
        found = table(SCORES)(overrides)
        own = (shares or {}).get((given.get("a", "0"), given.get("b", "1")), (1.0, 1.0))
        return found | {"runtime": {"int8_share": own[int(given["seed"]) - 7], "by": "engine", "nothing": None}}

    return Search(replace(space(), require={path: least}), run)


def test_a_trial_that_misses_a_condition_is_kept_with_its_reason_and_cannot_win():
    search = conditional(shares={("1", "1"): (1.0, 0.99), ("1", "2"): (0.5, 1.0)})
    assert search.best() == ("a=2", "b=1")  # without the condition: b=2, a=1
    missed = search.trials[1]
    assert missed.error == "runtime.int8_share is 0.99, the search requires 0.995"
    assert missed.metrics == {"score": pytest.approx(3.75)} and not missed.chosen
    assert search.trials[4].error == "runtime.int8_share is 0.5, the search requires 0.995"
    assert [t.error for t in search.trials if t.chosen] == ["", ""]


def test_a_condition_is_met_at_its_least_value_and_by_a_number_that_is_null():
    assert conditional(shares={("1", "2"): (0.995, 1.0)}).best() == ("b=2", "a=1")
    assert conditional(path="runtime.nothing").best() == ("b=2", "a=1")  # as attention's share without attention


@pytest.mark.parametrize("share", [math.nan, "1.0", True])
def test_what_is_no_number_misses_its_condition(share):
    search = conditional(shares={("1", "1"): (1.0, share), ("1", "2"): (share, share)})
    assert search.best() == ("a=2", "b=1")
    assert search.trials[1].error == f"runtime.int8_share is {share}, the search requires 0.995"


def test_a_stage_where_all_miss_ends_the_search():
    message = "stage one of the search: no candidate gave score: runtime.int8_share is 1.0, the search requires 1.5"
    with pytest.raises(PTQError, match=message):
        conditional(1.5).best()


@pytest.mark.parametrize("path", ["runtime.int8_shares", "runtime.int8_share.mean", "run", "runtime.by.name"])
def test_a_condition_on_what_no_trial_has_is_an_error_that_names_it(path):
    search = conditional(path=path)
    with pytest.raises(ConfigError, match=f"require: {path}: results.json of no trial has it"):
        search.best()
    assert len(search.trials) == 3  # the first stage's are kept


def test_a_trial_without_the_number_that_others_have_misses_the_condition():
    def run(overrides):
        engine = {} if "a=1" in overrides else {"runtime": {"int8_share": 1.0}}
        return table(SCORES)(overrides) | engine

    search = Search(replace(space(), require={"runtime.int8_share": 1.0}), run)
    assert search.best() == ("a=2", "b=1")
    assert search.trials[1].error == "results.json has no runtime.int8_share, of which the search requires 1.0"


def test_the_table_of_trials_has_scores_and_reasons_of_what_missed():
    search = conditional(shares={("1", "1"): (0.9, 0.9)})
    search.best()
    line = next(line for line in markdown(search.trials).splitlines() if "a=1" in line)
    assert "the search requires 0.995" in line


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


def of_images(values: dict, prompts: dict | None = None) -> callable:
    """A run whose score is the mean of values of single images, by (a, b); the seed changes nothing."""

    def run(overrides):
        given = dict(one.split("=") for one in overrides)
        found = np.asarray(values[given.get("a", "0"), given.get("b", "1")], float)
        more = {} if prompts is None else {"prompts": np.array(prompts[len(found)])}
        return {"metrics": {"score": float(found.mean())}, "pairs": {"score": found, **more}}

    return run


NOISE, WOBBLE = np.random.default_rng(0).normal(size=(2, 64))
WOBBLE -= WOBBLE.mean()


def test_a_gain_that_may_be_none_changes_nothing_however_large():
    values = {("0", "1"): 30 + NOISE, ("1", "1"): 30.1 + NOISE + 2 * WOBBLE, ("2", "1"): 30.02 + NOISE}
    search = Search(space().until("one"), of_images(values))
    assert search.best() == ("a=2",)  # 0.02 dB for every image; a=1 gains more, on some and not on others
    first, larger, steady = search.trials
    assert larger.metrics["score"] > steady.metrics["score"] > first.metrics["score"]
    both = larger.images.values - first.images.values
    assert len(both) == 128  # two seeds
    assert larger.gain == paired_bootstrap(both, 0 * both) and larger.gain[0] < 0 < larger.gain[1]
    assert first.gain is None and steady.gain == pytest.approx((0.02, 0.02))
    line = next(line for line in markdown(search.trials).splitlines() if "a=1" in line)
    assert f"[{larger.gain[0]:+.3g}, {larger.gain[1]:+.3g}]" in line
    assert "images" not in search.trials[0].to_dict() and search.trials[1].to_dict()["gain"] == larger.gain


def test_less_is_better_by_an_interval_too():
    values = {("0", "1"): 1 + NOISE, ("1", "1"): 0.9 + NOISE, ("2", "1"): 0.5 + NOISE + 3 * WOBBLE}
    search = Search(space("minimize").until("one"), of_images(values))
    assert search.best() == ("a=1",)
    assert search.trials[1].gain == pytest.approx((0.1, 0.1))  # gains are positive in either direction


def test_the_tolerance_counts_beside_the_interval():
    values = {("0", "1"): 30 + NOISE, ("1", "1"): 30.05 + NOISE, ("2", "1"): 30.2 + NOISE}
    assert Search(space(tolerance=0.1).until("one"), of_images(values)).best() == ("a=2",)


def test_images_of_one_prompt_are_drawn_again_together():
    """Of 64 images four prompts gain and one loses: with so few the gain may be none."""
    prompts = {64: [f"prompt {i % 4}" for i in range(64)]}
    gains = np.array([[0.5, 0.4, 0.3, -0.2][i % 4] for i in range(64)])
    values = {("0", "1"): NOISE, ("1", "1"): NOISE + gains, ("2", "1"): NOISE}
    assert Search(space().until("one"), of_images(values)).best() == ("a=1",)
    assert Search(space().until("one"), of_images(values, prompts)).best() == ()


def test_other_numbers_of_images_are_compared_by_the_tolerance_alone():
    values = {("0", "1"): [1.0, 2.0], ("1", "1"): [1.6], ("2", "1"): [1.0, 2.1]}
    search = Search(space().until("one"), of_images(values))
    assert search.best() == ("a=1",) and search.trials[1].gain is None


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
        ({"require": ["runtime.int8_share"]}, "require: expected paths in results.json and least values"),
        ({"require": {"runtime.int8_share": "all"}}, "require.runtime.int8_share=all: give a number"),
        ({"require": {"runtime.int8_share": math.nan}}, "require.runtime.int8_share=nan: give a number"),
        ({"require": {"runtime.int8_share": True}}, "require.runtime.int8_share=True: give a number"),
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


def test_the_space_for_engines_asks_for_integers():
    shipped = Space.load(config_folder() / "search" / "deploy.yaml")
    assert shipped.require == {"runtime.int8_share": 0.995, "runtime.attention_int8_share": 1.0}
    assert {"quantization=deploy", "runtime=openvino"} <= set(shipped.base)


@pytest.mark.parametrize("name", sorted(path.stem for path in (config_folder() / "search").glob("*.yaml")))
def test_every_candidate_of_the_shipped_spaces_composes(name):
    shipped = Space.load(config_folder() / "search" / f"{name}.yaml")
    with quick_yaml(), initialize_config_dir(str(config_folder()), version_base="1.3"):
        for stage in shipped.stages:
            for candidate, bits in zip(stage.candidates, itertools.cycle(("bits=w8a8", "bits=w4a4"))):
                validated(compose("config", overrides=list(merged(shipped.base, [bits], shlex.split(candidate)))))


def test_a_real_search_in_small(tmp_path, capsys):
    path = tmp_path / "tiny.yaml"
    base = ["calibration=uniform", "sampler.steps=2", "calibration.n_samples=4", "evaluation.n_samples=4",
            "evaluation.eps_error_samples=2", "evaluation.grid_images=2", f"cache_dir={tmp_path / 'cache'}",
            "evaluation=paired", "quantization=deploy", "logger=none", "save_quantized=false"]
    stages = [{"name": "metric", "candidates": ["metric=minmax", "metric=percentile"]},
              {"name": "eta", "candidates": ["", "sampler.eta=7"]}]
    path.write_text(yaml.safe_dump(GOOD | {"base": base, "seeds": [3], "stages": stages}))
    arguments = ["bits=w4a4", "quantization.smooth=true", "--space", str(path), "--folder", str(tmp_path / "out")]
    main(arguments)
    said = capsys.readouterr().out
    assert "sampler.eta=7.0: choose 0..1" in said
    trials = sorted((tmp_path / "out" / "trials").glob("*/results.json"))
    before = [trial.stat().st_mtime_ns for trial in trials]
    assert len(trials) == 2  # what was decided is not run again in the next stage
    found = read_json(tmp_path / "out" / "search.json")
    assert found[0]["gain"] is None and found[1]["gain"][0] < found[1]["gain"][1]  # of the images' own PSNR
    assert found[1]["chosen"] == (found[1]["gain"][0] > 0)
    main(arguments)  # again: nothing that had finished is run
    assert [trial.stat().st_mtime_ns for trial in trials] == before
    assert capsys.readouterr().out == said
    text = (tmp_path / "out" / "experiment.yaml").read_text()
    assert f"quantization.smooth=true --space {path}" in text
    found = yaml.safe_load(text)
    assert found["defaults"][-1] == {"override /bits": "w4a4"} and found["name"] == "tiny_${bits.name}"
    # what all trials share of the method belongs to what was found, and how it was measured does not
    assert found["defaults"][:2] == [{"override /calibration": "uniform"}, {"override /quantization": "deploy"}]
    assert found["quantization"] == {"smooth": True} and not {"evaluation", "sampler", "save_quantized"} & set(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["metric=mse"], "no bits among"), (["bits=w4a8", "--jobs", "0"], "--jobs=0"),
     (["bits=w4a8", "--space", "nothing"], "nothing.yaml is no readable"),
     (["bits=w4a8", "--space", "nothing", "metric=mse"], "nothing.yaml is no readable")],  # settings on both sides
)
def test_the_command_refuses(arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(arguments)
