"""200 malformed configurations, seeded: each ends in one line, none in a traceback, a hang or silent acceptance."""

import copy
import dataclasses
import os
import random
import subprocess
import sys
import types
import typing

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ptq_exp.errors import ConfigError, PTQError
from ptq_exp.experiment.plan import Plan
from ptq_exp.experiment.run import Run
from ptq_exp.settings.build import constructor
from ptq_exp.settings.compose import config_folder, validated
from ptq_exp.settings.schema import ExperimentConfig

HUGE = "99999999999999999999999"
BAD = {
    int: ["eight", "''", "1.5", "nan", "inf", "[1,2]", "{a:1}", "-3", HUGE, "true", "'☃'", "0x10"],
    float: ["abc", "''", "nan", "inf", "-inf", "[0.1]", "{a:1}", "-1", "1e400", "'☃'", "true"],
    bool: ["maybe", "2", "[]", "''", "nan", "{a:1}", "-1"],
    str: ["''", "[a]", "{a:1}", "nan", "' '", "true", "'a\tb'"],
    list: ["5", "text", "{a:1}", "[[1]]", "[null]", "[nan]", "''"],
    dict: ["5", "text", "''", "{_target_: 5}", "{_target_: nothing.here}", "{_target_: ''}", "{_target_: math.pi}"],
    "bits.schedule": ["5", "''", "[nan]", "nan", "{a:1}", "'☃'", "-1", "[[1]]", "'[8]*5'", "'[8]*1e9'", "'[]'"],
    "evaluation.reference": ["5", "''", "[nan]", "nan", "{_target_: nothing.here}", "-1", "[[1]]", "no_such_file.npz"],
}
"""Values that no setting of this type takes."""
# names may be any words
FINE = {"reconstruction.b_start=-1", "reconstruction.b_end=-1", "model.groups={_target_: math.pi}"}
GROUPS = {
    "correction.": "ptqd", "reconstruction.": "qdrop",
    "bits.candidates": "budget", "bits.bops_ratio": "budget", "bits.gain_": "budget",
    "bits.budget": "auto", "bits.sensitivity_": "auto", "bits.solution": "auto",
}
"""What has to be chosen for a setting to matter -> base configuration."""
BASES = {
    "": [], "ptqd": ["correction=ptqd", "sampler.eta=1"], "qdrop": ["reconstruction=qdrop"],
    "budget": ["bits=step_budget"], "auto": ["bits=auto", "bits.budget.size_mb=1.2"],
}
COPIES = {"model.images": "evaluation.reference", "model.sampler.steps": "sampler.steps",
          "model.sampler.eta": "sampler.eta", "model.sampler.guidance_scale": "sampler.guidance_scale"}
"""Settings that another one takes over, which is then the one that is named."""
QUICK = ["trainer.accelerator=cpu", "logger=none", "trainer.progress_bar=false", "cache_dir=nowhere"]


def leaves(schema=ExperimentConfig, prefix=""):
    """(setting, type) of every setting; a union without None, a generic type without its arguments."""
    for key, hint in typing.get_type_hints(schema).items():
        if dataclasses.is_dataclass(hint):
            yield from leaves(hint, f"{prefix}{key}.")
            continue
        if isinstance(hint, types.UnionType):
            # widths may be names of number formats, too: what no width takes is no name either
            hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
        kind = typing.get_origin(hint) or hint
        yield f"{prefix}{key}", list if kind is tuple else kind


def malformed(n, seed):
    """`n` different `setting=value`, every setting among them."""
    rng, pool = random.Random(seed), []
    for setting, kind in leaves():
        values = BAD[setting if setting in BAD else kind]
        cases = [f"{setting}={value}" for value in values if f"{setting}={value}" not in FINE]
        pool.append(rng.sample(cases, len(cases)))
    rounds = [case for n in range(20) for cases in pool for case in cases[n : n + 1]]
    return rounds[:n]


CASES = malformed(200, seed=0)


@pytest.fixture(scope="module")
def bases():
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return {name: compose("config", overrides=[*QUICK, *chosen]) for name, chosen in BASES.items()}


def outcome(config, override):
    """The line that ends a run with this override; None if nothing is wrong with it."""
    (parsed,) = OverridesParser.create().parse_overrides([override])
    config = copy.deepcopy(config)
    OmegaConf.set_struct(config, False)
    try:
        OmegaConf.update(config, parsed.key_or_group, parsed.value(), merge=False)
        settings = validated(config, [override])
        run = Run.of(settings)
        Plan.of(settings, run.grid)
        if override.startswith("model.images="):  # the first stage reads them
            constructor(settings.model.images, "model.images")
        if override.startswith("evaluation.reference="):
            from ptq_exp.experiment.features import reference_features

            reference_features(run, settings.evaluation)
    except PTQError as error:
        return str(error)
    except OmegaConfBaseException as error:
        return str(error).splitlines()[0]
    return None


def test_the_cases_are_two_hundred_and_reach_every_setting():
    assert len(set(CASES)) == 200
    assert {case.partition("=")[0] for case in CASES} == {setting for setting, _ in leaves()}


@pytest.mark.parametrize("override", CASES)
def test_a_malformed_value_ends_in_one_line(override, bases, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    setting = override.partition("=")[0]
    base = next((base for start, base in GROUPS.items() if setting.startswith(start)), "")
    text = outcome(bases[base], override)
    assert text is not None, "accepted"
    assert "\n" not in text and len(text) < 600
    named = [setting, COPIES.get(setting, setting), *(["name="] if setting.endswith(".name") else [])]
    assert any(word in text for word in named)


COMPOSED = [
    "+quantization.extra=1", "++bits.extra=1", "+model.sampler.extra=1", "+extra=1", "++nested.extra.more=1",
    "quantization=[full,layers]", "bits={weight:8}", "bits=null", "bits=''", "metric=5", "metric=☃", "sampler=nan",
    "model=[]", "~bits", "~sampler.steps", "~seed", "~nothing", "+metric=mse", "+bits.weight=8", "experiment=ndtc_w8a8",
    "+experiment=''", "+experiment=[ndtc_w8a8,fp32]", "+experiment=../config", "metric=../config", "bits@more=w4a4",
    "bits.weight", "=8", "bits.weight=", "bits..weight=8", ".=1", "bits.weight=[", "bits.weight='8", "${seed}=1",
    "seed=${nothing}", "seed=${seed}", "name=${oc.env:NO_SUCH_VARIABLE}", "name=a/b", "name=${run_name:a}",
    "model.checkpoint=${quantization}", "++bits=5", "++model=null", "seed=1,2", "hydra.nothing=1",
]


@pytest.mark.parametrize("override", COMPOSED)
def test_a_malformed_override_ends_in_one_line(override, monkeypatch, tmp_path):
    """Group choices, silent additions, deletions, interpolations and broken grammar, through the entry point."""
    import ptq_exp.experiment.experiment
    from ptq_exp.cli.main import main

    monkeypatch.setattr(ptq_exp.experiment.experiment, "run_experiment", lambda config, folder: pytest.fail("accepted"))
    monkeypatch.setattr(sys, "argv", ["ptq-exp", f"hydra.run.dir={tmp_path}/run", *QUICK, override])
    monkeypatch.chdir(tmp_path)
    lines = []
    monkeypatch.setattr("builtins.print", lambda *text, file=None, **_: lines.append(str(text[0])))
    with pytest.raises(SystemExit) as stop:
        main()
    lines = [line for line in [*lines, str(stop.value.code)] if line.startswith("error: ")]
    assert len(lines) == 1 and "\n" not in lines[0] and 10 < len(lines[0]) < 800


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({}, "where={}: where._target_ must name a function or class"),
        ({"_target_": "os"}, "where._target_=os: no such function or class"),
        ({"_target_": "ptq_exp.calibration.SkewNormal", "mean": "low"}, "where.mean=low: expected a number"),
        ({"_target_": "ptq_exp.calibration.SkewNormal", "std": float("nan")}, "where.std=nan: give a finite number"),
        ({"_target_": "ptq_exp.calibration.SkewNormal", "std": True}, "where.std=True: expected a number, not yes"),
        ({"_target_": "ptq_exp.load_model"}, "where.name: ptq_exp.load_model needs it, and it is not set"),
    ],
)
def test_constructors_that_cannot_be_called(node, message):
    with pytest.raises(ConfigError) as error:
        constructor(node, "where")
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("quantization.attention=2", "quantization.attention=2: choose true or false"),
        ("evaluation.batch_size=nan", "evaluation.batch_size=nan: give a finite number"),
        ("model.checkpoint=''", "model.checkpoint='': is empty; give text, or null where there is nothing to say"),
        ("cache_dir=5", "cache_dir=5: expected text; quote it if you mean the word: cache_dir=\"'5'\""),
        (f"sampler.steps={HUGE}", f"sampler.steps={HUGE}: too large, choose 1000000000 or less"),
    ],
)
def test_the_line_names_setting_and_fix(override, message, bases):
    assert outcome(bases[""], override) == message


@pytest.mark.parametrize("override", ["logger.group=7", "logger.tags=[1,a]", "seed=4294967295", "name='größe'"])
def test_unusual_but_right_values_are_taken(override, bases):
    assert outcome(bases[""], override) is None


@pytest.mark.parametrize("override", ["bits.weight=1", "trainer.accelerator=abacus"])
def test_the_command_line_says_it_in_one_line_too(override, tmp_path):
    """From any folder; one mistake is found while composing, the other by the run."""
    environment = os.environ | {"PYTHONPATH": str(config_folder().parent)}
    command = [sys.executable, "-m", "ptq_exp", override, "logger=none", "trainer.progress_bar=false"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    lines = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert run.returncode == 1 and len(lines) == 1 and "Traceback" not in run.stderr + run.stdout


def test_hydra_exceptions_are_not_swallowed_by_mistake():
    assert not issubclass(PTQError, HydraException)
