"""The command run in this process, in small, with a cache that the tests of a module share."""

import re
import shutil
import sys
from pathlib import Path

import pytest
from guide_runs import SMALL
from guide_text import PAGES, blocks
from small_forecasts import SMALLEST
from small_networks import (
    use_blank_pictures,
    use_few_candidate_ranges,
    use_one_composition,
    use_small_networks,
)

from ptq_exp import MODELS
from ptq_exp.calibration import SOURCES
from ptq_exp.cli.main import main
from ptq_exp.evaluation import SCORES
from ptq_exp.experiment.plan import Plan
from ptq_exp.experiment.run import Run
from ptq_exp.quantization import FORMATS, METRICS
from ptq_exp.settings.compose import composed_from


@pytest.fixture(scope="session")
def common_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("common_cache")


@pytest.fixture(scope="module")
def cache(request, tmp_path_factory, common_cache) -> Path:
    """A cache of the module's own; the common one for modules that set COMMON_CACHE, whatever others left there.

    Those search ranges as `small_networks` does: it is no setting, and the cache cannot tell such ranges from others.
    """
    return common_cache if getattr(request.module, "COMMON_CACHE", False) else tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def placed(tmp_path_factory):
    """Objects of a run of a small network, its plan and its settings: what a forecast measures."""
    with pytest.MonkeyPatch.context() as patch:
        use_small_networks(patch)
        config = composed_from([*SMALLEST, "+experiment=svdquant", f"cache_dir={tmp_path_factory.mktemp('cache')}"])
        run = Run.of(config)
        yield run, Plan.of(config, run.grid), config


@pytest.fixture
def small_networks(monkeypatch):
    """Small networks of random weights, a short search of ranges, empty pictures: where none of them matters."""
    use_small_networks(monkeypatch)
    use_few_candidate_ranges(monkeypatch)
    use_blank_pictures(monkeypatch)


@pytest.fixture
def blank_pictures(monkeypatch):
    """Empty pictures alone, for models of a test's own."""
    use_blank_pictures(monkeypatch)


@pytest.fixture
def command(monkeypatch, tmp_path, cache):
    """Run the command in this process; returns the run folder."""
    use_one_composition(monkeypatch)

    def run(*overrides: str) -> Path:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        argv = ["ptq_exp", *SMALL, f"cache_dir={cache}", f"hydra.run.dir={folder}", *overrides]
        monkeypatch.setattr(sys, "argv", argv)
        main()
        return folder

    return run


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Run folders by name, each made once; they are only read."""
    return {}


@pytest.fixture
def run_of(command, saved, tmp_path_factory):
    """The folder of a run with these overrides, moved away from where it was made."""

    def run(*overrides):
        if overrides not in saved:
            folder = tmp_path_factory.mktemp("saved") / "run"
            shutil.move(command("metric=minmax", "logger=none", *overrides), folder)
            saved[overrides] = folder
        return saved[overrides]

    return run


@pytest.fixture
def refused(command, capsys):
    """Run the command, which must refuse; returns the one line that it says."""

    def line(*overrides: str) -> str:
        with pytest.raises(SystemExit) as stop:
            command(*overrides)
        said = (str(stop.value) + "\n" + capsys.readouterr().err).splitlines()
        (found,) = [text for text in said if "error:" in text]
        return found

    return line


@pytest.fixture(scope="module")
def guide_folder(tmp_path_factory):
    """A folder with the Python files of the guide, as the reader has it."""
    folder = tmp_path_factory.mktemp("here")
    for page in PAGES:
        # lines to type, no files
        if page in ("saved_models", "published_models", "pipelines", "embedded_pipelines", "transforms"):
            continue
        for code in blocks(page, "python"):
            name = re.match(r"# (\w+\.py)\n", code)
            assert name, f"a code block of {page} has no file name"
            (folder / name[1]).write_text(code)
    registries = [(registry, dict(registry)) for registry in (MODELS, METRICS, SOURCES, SCORES, FORMATS)]
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for registry, before in registries:
        registry.clear()
        registry.update(before)
    for path in folder.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def here(guide_folder, monkeypatch):
    """The same, and the command is started there."""
    monkeypatch.chdir(guide_folder)
    return guide_folder
