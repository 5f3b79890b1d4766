"""Where the command is started: encodings of the output and of file names, closed streams, a notebook's pictures."""

import io
import os
import subprocess
import sys

import pytest

import ptq_exp.settings.compose
from ptq_exp.errors import command_line, start_command


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_what_an_encoding_lacks_is_replaced(encoding, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    with command_line():
        print("\u2190 best FID \u0394")
    assert raw.getvalue() == b"? best FID ?\n"


def test_closed_streams_and_the_back_end_of_a_notebook(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    start_command()
    print("nowhere")
    print("nowhere", file=sys.stderr)
    assert os.environ["MPLBACKEND"] == "agg"


def test_names_of_files_are_utf8_in_every_locale(tmp_path):
    """The name reaches the disk as UTF-8, and what the terminal's encoding lacks is replaced."""
    (tmp_path / "\u00fc").mkdir()
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    root = os.path.dirname(os.path.dirname(ptq_exp.settings.compose.__file__))
    run = subprocess.run(
        [sys.executable, "-m", "ptq_exp", "cache", "ls", "cache_dir='\u00fc'"], cwd=tmp_path, capture_output=True,
        timeout=120, env={**os.environ, **locale, "PYTHONPATH": root}, check=False,
    )
    assert (run.returncode, run.stdout) == (0, b"? is empty\n"), run.stderr
