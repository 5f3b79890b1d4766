"""The wheel holds every module, every configuration file and the embedded weights of the checkout."""

import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ptq_exp

CHECKOUT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the checkout, built from a copy (a build leaves files in its source), without network."""
    source = tmp_path_factory.mktemp("source")
    for name in ("ptq_exp", "conf"):
        shutil.copytree(CHECKOUT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run([*command, "--wheel-dir", "dist"], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = (source / "dist").glob("ptq_exp-*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def files_below(folder, pattern):
    paths = {path for path in (CHECKOUT / folder).rglob(pattern) if path.is_file()}
    return {path.relative_to(CHECKOUT).as_posix() for path in paths if "__pycache__" not in path.parts}


def in_wheel(wheel, prefix, ending=""):
    return {name for name in wheel.namelist() if name.startswith(prefix) and name.endswith(ending)}


def test_every_module_is_packed(wheel):
    assert in_wheel(wheel, "ptq_exp/", ".py") == files_below("ptq_exp", "*.py")


def test_every_configuration_file_is_packed(wheel):
    expected = {f"ptq_exp/{name}" for name in files_below("conf", "*.yaml")}
    assert "ptq_exp/conf/config.yaml" in expected
    assert in_wheel(wheel, "ptq_exp/conf/", ".yaml") == expected


def test_the_embedded_weights_are_packed(wheel):
    weights = files_below("ptq_exp/embedded/weights", "*")
    assert {Path(name).suffix for name in weights} == {".safetensors", ".json", ".txt"}
    assert {"digits_text", "digits_flow"} < {Path(name).parts[3] for name in weights}
    assert in_wheel(wheel, "ptq_exp/embedded/weights/") == weights


def test_the_templates_of_reports_are_packed(wheel):
    templates = files_below("ptq_exp/reports/html/templates", "*")
    assert {Path(name).suffix for name in templates} == {".j2", ".css", ".js"}
    assert in_wheel(wheel, "ptq_exp/reports/html/templates/") == templates


def test_the_package_says_that_it_is_typed(wheel):
    assert "ptq_exp/py.typed" in wheel.namelist()


def test_the_command_is_installed(wheel):
    (name,) = in_wheel(wheel, "ptq_exp-", "entry_points.txt")
    entries = configparser.ConfigParser()
    entries.read_string(wheel.read(name).decode())
    assert entries["console_scripts"]["ptq-exp"] == "ptq_exp.cli.main:main"


def test_the_installed_package_finds_its_configuration_from_any_folder(wheel, tmp_path, monkeypatch):
    from ptq_exp.settings.compose import config_folder

    wheel.extractall(tmp_path / "site")
    monkeypatch.setattr(ptq_exp, "__file__", str(tmp_path / "site" / "ptq_exp" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    assert config_folder() == (tmp_path / "site" / "ptq_exp" / "conf").resolve()
