"""The guide in docs/: its commands compose, its settings exist, its estimates are what the formula gives."""

import functools
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from guide_text import ALL, DOCS, OF_CIFAR, PAGES, RUNS, blocks, commands, conf, jobs, tool
from omegaconf import OmegaConf

from ptq_exp.cli import table
from ptq_exp.cli.bench import settings_of
from ptq_exp.cli.coordinate_search import merged
from ptq_exp.cli.export import SETTINGS as EXPORT_SETTINGS
from ptq_exp.cli.export import settings as export_settings
from ptq_exp.cli.search import _parser as search_parser
from ptq_exp.cli.search_space import Space
from ptq_exp.diffusion.zoo.registry import load_model
from ptq_exp.errors import ConfigError
from ptq_exp.reports.tables.columns import VALUES
from ptq_exp.reports.tables.layouts import find_layout
from ptq_exp.reports.tables.result_table import ResultTable
from ptq_exp.settings.compose import config_folder
from ptq_exp.settings.schema import ExperimentConfig


def test_every_command_is_of_a_kind_that_is_checked():
    assert {" ".join(words[:3]) for _, words in ALL} == {"python -m ptq_exp"}
    assert {tool(words) for _, words in ALL} == {"", "table", "bench", "export", "search", "train_embedded"}
    assert len(RUNS) > 30


@pytest.mark.parametrize("page, arguments", RUNS, ids=[f"{page}{i}" for i, (page, _) in enumerate(RUNS)])
def test_every_run_composes_and_a_table_can_tell_its_rows_apart(page, arguments, here):
    configs = [_composed(job) for job in jobs(arguments)]
    # names tell rows apart; tables of measured results ask for other settings by their keys
    keys = [_by_key(config) if page == "tables" or page.startswith("results/") else () for config in configs]
    rows = {(config.name, config.metric.name, config.seed, key) for config, key in zip(configs, keys, strict=True)}
    assert len(rows) == len(configs)


def _composed(job: list[str]) -> ExperimentConfig:
    """The configuration of a job; jobs that differ in the seed alone are composed once."""
    seeds = [int(override.removeprefix("seed=")) for override in job if override.startswith("seed=")]
    assert min(seeds, default=0) >= 0
    found = _without_seed(*(override for override in job if not override.startswith("seed=")))
    return replace(found, seed=seeds[-1]) if seeds else found


_without_seed = functools.cache(conf)


def _by_key(config: ExperimentConfig) -> tuple:
    calibration, sampler = config.calibration, config.sampler
    return (
        calibration.labels, json.dumps(calibration.distribution), sampler.solver, sampler.eta, config.correction.name
    )


def test_the_tables_are_filled_by_the_sweeps_of_their_layouts():
    shown = {}
    for block in blocks("tables", "bash"):
        *sweeps, made = block.strip().splitlines()
        if name := re.search(r"--layout (\w+)", made):
            shown[name[1]] = sweeps
    assert set(shown) == {"ptq4dm_calibration", "ptq4dm_timesteps", "ptq4dm_metric"}
    folder = config_folder() / "table"
    assert {name: [*find_layout(name, folder).command] for name in shown} == shown


@pytest.mark.parametrize("arguments", OF_CIFAR)
def test_runs_for_imagenet_compose_for_cifar(arguments):
    assert conf(*jobs(arguments)[-1]).model.name == "ddim_cifar10"


@pytest.mark.parametrize("words", [words for _, words in ALL if tool(words) == "bench"])
def test_every_bench_has_settings_that_there_are(words):
    assert settings_of(words[4:])["quantized"]


@pytest.mark.parametrize("words", [words for _, words in ALL if tool(words) == "export"])
def test_every_export_has_settings_that_there_are(words):
    assert {"quantized", "format", "out"} <= export_settings(words[4:]).keys()


@pytest.mark.parametrize("words", [words for _, words in ALL if tool(words) == "search"])
def test_every_search_has_a_space_and_settings_that_there_are(words):
    arguments = search_parser().parse_args(words[4:])
    space = Space.load(config_folder() / "search" / f"{arguments.space}.yaml")
    assert any(override.startswith("bits=") for override in arguments.overrides)
    conf(*merged(space.base, arguments.overrides))


@pytest.mark.parametrize("words", [words for _, words in ALL if tool(words) == "table"])
def test_every_table_command_is_one(words, monkeypatch):
    asked = []
    empty = ResultTable(pd.DataFrame({"x": ["y"]}), {"x": "x"}, {}, {}, [])

    def made(runs, request):
        asked.append(runs)
        keys = (*request.rows, *request.cols)  # of calibration.distribution anything may be asked
        assert {key.removesuffix(".mean") for key in keys} <= known_settings()
        assert set(request.values) <= {*VALUES, "mean_distance"}  # a score of one's own, as the page on them adds it
        return empty

    monkeypatch.setattr(table, "make_table", made)
    monkeypatch.setattr(table, "_runs", lambda arguments: arguments.runs)
    table.main(words[4:])
    assert asked in ([[Path("runs/sweeps")]], [[Path("runs")]])


def known_settings() -> set[str]:
    def walk(node, prefix=""):
        for key, value in node.items():
            yield f"{prefix}{key}"
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")

    schema = OmegaConf.to_container(OmegaConf.structured(ExperimentConfig()))
    return {*walk(schema), "model.images.path", "experiment"}


FILES = (".ckpt", ".safetensors", ".json", ".npz", ".html", ".png", ".md")
ENGINE = ["runtime=openvino"]
MAPPINGS = ("bits.budget",)
"""Settings whose entries the text names."""
COMPANIONS = {"bits.bops_ratio": ["bits=step_budget"], "bits.budget": ["bits=auto"],
              "bits.schedule": ["bits=step_list"], "model.ema": ["model=ldm4_lsun_bedrooms256"],
              "model.conditions": ["model=diffusers"], "runtime.regrid": ENGINE,
              "runtime.weights": ENGINE, "runtime.measure": ENGINE}


def test_every_setting_in_the_text_exists_and_takes_that_value(here):
    known, seen = known_settings(), set()
    for page, text in PAGES.items():
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for code in re.findall(r"`([^`]+)`", prose):
            if code.startswith("python -m ptq_exp search "):
                seen.update(search_parser().parse_args(shlex.split(code)[4:]).overrides)
            elif "=" not in code and code.endswith(FILES):
                continue
            elif re.fullmatch(r"[a-z_]+\.[a-z_]+", code) and code.partition(".")[0] in known:
                assert code in known, f"{page}: {code}"
            seen.update(word for word in shlex.split(code) if "(" not in code and re.match(r"\+?[a-z_.]+=", word))
    assert len(seen) > 60
    seen -= {word for _, arguments in RUNS for word in arguments}  # these compose in another test
    for setting in sorted(seen):
        key, _, value = setting.lstrip("+").partition("=")
        if key in EXPORT_SETTINGS and key not in known:
            continue
        assert key in known or key.rpartition(".")[0] in MAPPINGS, setting
        if not value or (config_folder() / key / f"{value}.yaml").exists():  # a column; or composed in test_settings
            continue
        beside = COMPANIONS.get(key, COMPANIONS.get(key.rpartition(".")[0], []))
        try:
            conf(*beside, f"{setting.partition('=')[0]}={value.partition(',')[0] if value[0] != '[' else value}")
        except ConfigError as error:  # alone it may lack its companions, but never be an unknown word
            assert "choose one of" not in str(error) and "no such" not in str(error), setting


def table_of_hours() -> list[list[str]]:
    text = PAGES["reproduce"].partition("| section |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    assert len(rows) > 10
    return rows


@pytest.mark.parametrize("row", table_of_hours(), ids=lambda row: row[0])
def test_estimated_hours_are_what_the_formula_gives(row):
    section, images, steps, halves, macs, sets, hours = row
    work = float(sets) * float(images) * float(steps) * float(halves) * float(macs) * 1e9
    assert float(hours) == round(work / 5e12 / 3600, 1)
    if "one full-precision or quantized set" in section:
        return
    text = re.split(rf"^##+ {re.escape(section)}\n", PAGES["reproduce"], flags=re.MULTILINE)
    assert len(text) == 2, f"no section {section}"
    variables = {}
    commands(text[0], variables)
    found = commands(re.split(r"^##", text[1], flags=re.MULTILINE)[0], variables)
    runs = [job for words in found if not tool(words) for job in jobs(words[3:])]
    assert int(sets) == 1 + len(runs)


@pytest.mark.parametrize("row", table_of_hours(), ids=lambda row: row[0])
def test_images_and_steps_of_the_estimate_are_those_of_the_commands(row):
    section, images, steps, halves = row[0], *map(int, row[1:4])
    if "one full-precision or quantized set" in section:
        return
    text, variables = re.split(rf"^##+ {re.escape(section)}\n", PAGES["reproduce"], flags=re.MULTILINE), {}
    commands(text[0], variables)
    words = commands(re.split(r"^##", text[1], flags=re.MULTILINE)[0], variables)[0]
    config = conf(*jobs(words[3:])[0])
    assert (config.evaluation.n_samples, config.sampler.steps) == (images, steps)
    assert halves == (1 if config.sampler.guidance_scale == 1 else 2)


@pytest.mark.filterwarnings("ignore:model .*random weights")
@pytest.mark.parametrize("name, wanted", [("ddim_cifar10", "8.14"), ("ddpm_cifar10", "6.05")])
def test_multiplications_of_the_estimate_are_those_of_the_network(name, wanted):
    model, total = load_model(name), []
    for module in model.denoiser.to("meta").modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(lambda m, _, out: total.append(out.numel() * m.weight[0].numel()))
    model.example_inputs().to("meta").evaluate(model.denoiser)
    assert f"{sum(total) / 1e9:.2f}" == wanted
    assert wanted in {row[4] for row in table_of_hours()}


def test_multiplications_of_ldm4_are_those_of_the_original():
    layers = json.loads((DOCS.parent / "tests" / "golden" / "ldm4_macs.json").read_text())
    assert f"{sum(row[2] for row in layers) / 1e9:.2f}" == "99.77"
