"""The command `export` on a saved model of an earlier version."""

import zipfile
from pathlib import Path

import pytest

from ptq_exp.cli.export import main
from ptq_exp.deploy import load

GOLDEN_FOLDER = Path(__file__).parents[1] / "golden"


@pytest.fixture
def exported(tmp_path, capsys, monkeypatch):
    """Export in a format to `out`; returns what was printed, and the model that was loaded for it."""

    def run(form, out):
        made, own = [], load.load_quantized
        monkeypatch.setattr(load, "load_quantized", lambda *path: made.append(own(*path)) or made[0])
        with zipfile.ZipFile(GOLDEN_FOLDER / "saved_model_1.zip") as archive:
            archive.extractall(tmp_path)
        saved = [f"quantized={tmp_path / 'quantized'}", f"checkpoint={tmp_path / 'model'}"]
        main([*saved, f"format={form}", f"out={out}"])
        return capsys.readouterr().out, made[0]

    return run
