"""Each check tells good from bad, and a problem ends in exit status 1."""

import json
import re
import shutil
import subprocess
import sys
from importlib import metadata

import pytest

from ptq_exp.cli import checkups
from ptq_exp.cli.checkups import OK, PROBLEM, WARNING
from ptq_exp.cli.doctor import examination, report
from ptq_exp.cli.main import main


def levels(findings):
    return [finding.level for finding in findings]


def test_the_report_has_a_line_for_every_subject_and_fixes_for_what_is_not_ok(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["ptq-exp", "doctor", f"cache_dir={tmp_path}", "--runs", str(tmp_path / "a/b")])
    with pytest.raises(SystemExit) as stop:
        main()
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == any(line.startswith("problem") for line in lines)
    for subject in ("Python 3", "torch ", "extra test", "CPU:", "CUDA", "MPS", "runs:", "cache_dir:",
                    "embedded weights"):
        assert any(subject in line for line in lines), subject
    assert all(re.match(r"(ok|warning|problem) +\w", line) for line in lines[:-1])
    assert all("; " in line for line in lines[:-1] if line.startswith(("warning", "problem")))


def test_a_problem_and_a_check_that_breaks_end_in_status_1(capsys):
    def broken():
        raise RuntimeError("two\nlines")

    assert report([lambda: [checkups.Finding(OK, "fine")], lambda: [checkups.Finding(WARNING, "a", "b")]]) == 0
    assert report([broken, lambda: [checkups.Finding(OK, "still there")]]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [
        "problem  the check failed: RuntimeError: two lines; install ptq-exp again", "ok       still there",
        "1 ok, 1 problem",
    ]


def test_old_python(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    assert levels(checkups.python()) == [PROBLEM]


def test_missing_and_old_packages_are_problems_and_missing_extras_are_not(monkeypatch):
    real = metadata.version

    def version(name):
        if name in ("wandb", "ruff"):
            raise metadata.PackageNotFoundError(name)
        return "1.0" if name == "torch" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    found = list(checkups.packages())
    assert {finding.text for finding in found} == {"torch 1.0, but >=2.5 is needed", "wandb: not installed"}
    assert set(levels(found)) == {PROBLEM} and all(finding.fix.startswith("pip install '") for finding in found)
    extras = {finding.text.split()[1]: finding for finding in checkups.extras()}
    assert set(levels(extras.values())) == {OK}
    assert "ruff: not installed" in extras["dev"].text and "ptq-exp[dev]" in extras["dev"].fix


def test_the_installed_package_and_the_checkout_need_the_same(monkeypatch, tmp_path):
    from_checkout = checkups.requirements()
    monkeypatch.setattr(checkups, "_PACKAGE", tmp_path / "site" / "ptq_exp")
    lines = ["torch>=2.5", 'pytest>=8.2; extra == "test"', 'wandb>=0.31; extra == "test"']
    about = metadata.metadata("pytest")
    del about["Provides-Extra"]
    about["Provides-Extra"] = "test"
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    monkeypatch.setattr(metadata, "metadata", lambda name: about)
    needed, extras = checkups.requirements()
    assert [str(item) for item in needed] == ["torch>=2.5"]
    assert {name: [item.name for item in items] for name, items in extras.items()} == {"test": ["pytest", "wandb"]}
    assert {"torch", "hydra-core"} <= {item.name for item in from_checkout[0]} and "test" in from_checkout[1]


@pytest.mark.parametrize(("free", "level"), [(1e8, PROBLEM), (1e9, WARNING), (1e12, OK)])
def test_disk_space(monkeypatch, tmp_path, free, level):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(1e13, 0, free))
    (finding,) = checkups.disk("runs", tmp_path / "not" / "yet")
    assert finding.level == level and str(tmp_path / "not" / "yet") in finding.text
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path):
    (tmp_path / "file").write_text("")
    (finding,) = checkups.disk("cache_dir", tmp_path / "file" / "cache")
    assert finding.level == PROBLEM and "cannot be written" in finding.text and "cache_dir=PATH" in finding.fix


def test_embedded_weights_are_compared_with_their_cards(monkeypatch, tmp_path):
    assert levels(checkups.weights()) == [OK]
    folder = tmp_path / "embedded" / "weights"
    folder.mkdir(parents=True)
    monkeypatch.setattr(checkups, "_PACKAGE", tmp_path)
    assert levels(checkups.weights()) == [PROBLEM]
    (folder / "a.safetensors").write_bytes(b"weights")
    (folder / "a.json").write_text(json.dumps({"sha256": "0" * 64}))
    (finding,) = checkups.weights()
    assert finding.level == PROBLEM and "embedded weights a:" in finding.text


def test_the_whole_list_is_examined(tmp_path):
    assert len(examination(tmp_path, tmp_path)) == 7


def test_the_status_reaches_the_shell(tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "ptq_exp", "doctor", "--runs", str(tmp_path / "file" / "runs")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1 and "problem  runs: " in run.stdout
