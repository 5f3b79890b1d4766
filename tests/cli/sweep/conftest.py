"""Sweeps through the command in this process, in small, with a cache that the tests of a module share."""

import sys
from pathlib import Path

import pytest
from small_networks import use_one_composition

from ptq_exp.cli.main import main
from ptq_exp.storage.plain_json import read_json

SMALL = [
    "sampler.steps=2", "evaluation.n_samples=4", "evaluation.batch_size=4", "evaluation.eps_error_samples=2",
    "evaluation.grid_images=2", "evaluation.fid_resamples=2",
    "calibration.n_samples=4", "calibration.batch_size=4", "trainer.progress_bar=false",
    "trainer.accelerator=cpu", "save_quantized=false", "metric=minmax",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def command(monkeypatch):
    """Run the command with these arguments; returns what it exits with: None, a number or a message."""
    use_one_composition(monkeypatch)

    def run(*arguments: str) -> int | str | None:
        monkeypatch.setattr(sys, "argv", ["ptq_exp", *arguments])
        try:
            return main()
        except SystemExit as stop:
            return stop.code

    return run


@pytest.fixture
def sweep(command, cache):
    """Start a sweep with small jobs in `folder`; returns what the command exits with."""

    def run(folder: Path, *overrides: str) -> int | str | None:
        return command("-m", *SMALL, f"cache_dir={cache}", f"hydra.sweep.dir={folder}", *overrides)

    return run


@pytest.fixture
def jobs():
    """Folder name -> results of the jobs of a sweep."""

    def read(folder: Path) -> dict[str, dict]:
        return {path.parent.name: read_json(path) for path in sorted(folder.glob("*/results.json"))}

    return read
