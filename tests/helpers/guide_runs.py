"""The experiments that README and docs start from nothing: which jobs of their commands are run, and on which model."""

import functools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from guide_text import PAGES, commands, conf, jobs, tool

from ptq_exp.cli.arguments import spelt_out
from ptq_exp.experiment.budget import check_budget, check_feasible
from ptq_exp.experiment.plan import Plan
from ptq_exp.experiment.run import Run
from ptq_exp.quantization import FORMATS, Report
from ptq_exp.settings.compose import config_folder
from ptq_exp.settings.schema import ExperimentConfig
from ptq_exp.storage.plain_json import read_json

TEXTS = {"top": (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8"), **PAGES}
SIZES = ("sampler.steps", "evaluation.n_samples", "evaluation.batch_size", "evaluation.eps_error_samples", "seed",
         "calibration.n_samples", "reconstruction.iterations", "reconstruction.batch_size")
"""Settings of a command that are sizes; of the seeds one will do."""
PUBLISHED = ("evaluation", "evaluation.reference", "model.images.path", "model.ema", "quantization.keep_fp")
"""Settings of commands for a published model that belong to its files and layers."""
SMALL = [
    "sampler.steps=3", "evaluation.n_samples=10", "evaluation.batch_size=5", "evaluation.eps_error_samples=2",
    "evaluation.grid_images=4", "evaluation.fid_resamples=2", "calibration.n_samples=6", "calibration.batch_size=4",
    "trainer.progress_bar=false",
    "trainer.accelerator=cpu", "correction.n_samples=4", "correction.batch_size=4",
    "reconstruction.iterations=2", "quantization.temporal_bins=2",
]
"""What every run of tests/experiment is given."""
TINY = (
    "reconstruction.iterations=1", "evaluation.n_samples=6", "evaluation.batch_size=6", "evaluation.fid_resamples=2",
)
QUICK_GAINS = ("bits.gain_samples=2", "bits.gain_steps=2")
"""Of bits that are chosen by what each step gains."""


def shrunk(arguments: list[str]) -> list[str]:
    """The overrides of a command without sizes; a published model becomes an embedded one."""
    kept = [argument for argument in arguments if argument.partition("=")[0] not in SIZES]
    text = " ".join(arguments)
    if "model=pipeline" in text:  # pictures of its small pipeline are small, and no weights of Inception are at hand
        kept = [one for one in kept if one.partition("=")[0] not in ("model.call", "model.config", "evaluation")]
        return ["model.checkpoint=FOLDER" if one.startswith("model.checkpoint=") else one for one in kept]
    if "ldm4" not in text and not re.search(r"model=dd[ip]m_", text):
        return kept
    kept = [one for one in kept if one.partition("=")[0] not in (*PUBLISHED, "model", "model.checkpoint")]
    return [*kept, "model=digits_ldm" if "ldm4" in text else "model=digits"]


@functools.cache
def runs() -> list[tuple[str, tuple[str, ...]]]:
    """(page, job) of all commands that start experiments from nothing, each job once."""
    chosen: dict[tuple[str, ...], tuple[str, tuple[str, ...]]] = {}
    seen: set[str] = set()
    for page, text in TEXTS.items():
        for words in commands(text, {}):
            given = [word for word in spelt_out(words[3:]) if not word.startswith(("-", "hydra"))]
            named = any(override.startswith(("quantized=", "sweep.resume=")) for override in given)
            if tool(words) or named or "=" not in " ".join(given):
                continue
            of_command = [tuple(job) for job in jobs(["-m", *shrunk(given)])]
            for n, job in enumerate(of_command):
                methods = {override for override in job if "." not in override.partition("=")[0]}
                if n == 0 or not seen.issuperset(methods):
                    chosen.setdefault(tuple(sorted(job)), (page, job))
                    seen |= methods
    return list(chosen.values())


def is_plain(job: tuple[str, ...]) -> bool:
    """Whether it is an experiment file as it stands, on the default model."""
    return len(job) <= 2 and job[0].startswith("+experiment=") and job[1:] in ((), ("model=digits",))


EXPERIMENTS = config_folder() / "experiment"


@functools.cache
def settings_of(job: tuple[str, ...]) -> dict[str, str]:
    """What a job chooses by hand or by its experiment file, each on the model that it runs on; names and sizes apart.

    Settings that are computed from others count as what stands in their place: `tfmq_${bits.name}`.
    """
    chosen: dict[str, str] = {}
    for override in job:
        key, _, value = override.lstrip("+").partition("=")
        if key == "experiment":
            chosen |= _of_file(value)
        else:
            chosen[key] = value
    model = chosen.pop("model", "digits")
    model = "digits_ldm" if "ldm4" in model else model
    return {key: f"{model}: {_kind(key, value)}" for key, value in chosen.items()
            if not re.search(r"\bname$", key) and key not in SIZES}


def _kind(key: str, value: str) -> str:
    """What a value has in common with others, of which one will do: widths, number formats, numbers."""
    if key == "bits":
        return "integers" if re.fullmatch(r"w\d+a\d+", value) else "a format" if value in FORMATS else value
    return "a number" if re.fullmatch(r"-?\d+(\.\d+)?", value) and key != "sampler.eta" else value


@functools.cache
def _of_file(name: str) -> dict[str, str]:
    content = yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text(encoding="utf-8"))
    groups = (next(iter(entry.items())) for entry in content.pop("defaults", []) if isinstance(entry, dict))
    return {key.removeprefix("override /"): str(value) for key, value in groups} | _flat(content)


def _flat(node: dict, prefix: str = "") -> dict[str, str]:
    found = {}
    for key, value in node.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return found


@functools.cache
def brings_something(job: tuple[str, ...]) -> bool:
    """Whether a job sets something as neither an experiment file nor a job before it does on the same model."""
    seen = {pair for path in EXPERIMENTS.glob("*.yaml") for pair in settings_of((f"+experiment={path.stem}",)).items()}
    for _, other in runs():
        new = settings_of(other).items() - seen
        if other == job:
            return bool(new)
        seen |= new
    raise ValueError(f"{job} is no job of runs()")


def chosen_by(page: Callable[[str], bool]) -> list:
    """The jobs of some pages for `pytest.mark.parametrize`; their names say whether they are run: see `run_or_plan`."""
    chosen = [job for name, job in runs() if page(name) and not is_plain(job)]
    return [pytest.param(job, id=f"{'run' if brings_something(job) else 'plan'} {' '.join(job)[:80]}")
            for job in chosen]


def run_or_plan(job: tuple[str, ...], command) -> None:
    """Run a job that brings something new, by the fixture `command`; of another check that it is feasible."""
    if brings_something(job):
        run_as_it_stands(job, command)
        return
    config = conf(*SMALL, *_own(job), *job)
    if config.bits.name == "fp32":
        Run.of(config)
        return
    report = planned(config)
    check_budget(config.bits.min_bops_ratio, report)
    assert report.rows


def planned(config: ExperimentConfig) -> Report:
    """The report of the quantized network that a run with these settings would have; found out, it may be refused."""
    run = Run.of(config)
    return check_feasible(run, Plan.of(config, run.grid), config)[0]


def run_as_it_stands(job: tuple[str, ...], command) -> Path:
    """Run a job in small, with the default logger, by the fixture `command`; it must end well. Returns its folder."""
    folder = command(*job, *_own(job), *TINY)
    assert_recorded(folder)
    return folder


def _own(job: tuple[str, ...]) -> list[str]:
    """What a job needs beside its settings in order to be small, or to be at all."""
    own = ["evaluation=paired"] if "model=diffusers" in job else []
    if any(override.startswith("bits.schedule=") for override in job):
        own.append("sampler.steps=20")  # a width for each of them
    bits = [override for override in job if override.startswith("bits=")]
    if bits == ["bits=step_budget"] or (not bits and any(override.endswith("_mp") for override in job)):
        own += QUICK_GAINS
    return own


def assert_recorded(folder: Path) -> None:
    """Check that a run with the default logger is finished, and that it and W&B lack nothing."""
    results = read_json(folder / "results.json")
    assert results["status"] == "finished" and results["config"]["logger"]["mode"] == "offline"
    assert list(folder.glob("wandb/offline-run-*/run-*.wandb"))
    (log,) = folder.glob("*.log")
    said = log.read_text(encoding="utf-8")
    assert "W&B lacks" not in said and "was not made" not in said
