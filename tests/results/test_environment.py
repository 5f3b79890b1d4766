"""What a run was made with: versions as installed, the commit of a checkout, commands from what Hydra left."""

import shlex
import subprocess
import sys
from importlib.metadata import version

import torch

from ptq_exp.results.environment import environment, git_commit, run_command, sweep_command
from ptq_exp.storage.plain_json import to_plain


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_the_environment_is_plain_and_true():
    found = environment()
    assert to_plain(found) == found
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert (found["torch"], found["diffusers"]) == (version("torch"), version("diffusers"))
    assert found["threads"] == torch.get_num_threads() and found["platform"] and found["processor"]


def test_the_commit_of_a_checkout_and_whether_files_were_changed(tmp_path):
    assert git_commit(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert git_commit(tmp_path) is None  # no commit yet
    (tmp_path / "a.txt").write_text("1")
    git(tmp_path, "add", "a.txt")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "HEAD").strip()
    (tmp_path / "untracked.txt").write_text("x")
    assert git_commit(tmp_path) == commit
    (tmp_path / "a.txt").write_text("2")
    assert git_commit(tmp_path) == f"{commit}+changes"
    (tmp_path / "inside").mkdir()
    assert git_commit(tmp_path / "inside") is None  # a package installed below another project's checkout


def test_commands_can_be_pasted(tmp_path):
    assert run_command(tmp_path) == "python -m ptq_exp" and sweep_command(tmp_path) is None
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text("- bits.schedule='[8]*2'\n- model.checkpoint=a b.ckpt\n")
    assert shlex.split(run_command(tmp_path))[3:] == ["bits.schedule='[8]*2'", "model.checkpoint=a b.ckpt"]
    (tmp_path / "multirun.yaml").write_text("hydra:\n  overrides:\n    task:\n    - seed=0,1\n")
    assert sweep_command(tmp_path) == "python -m ptq_exp -m seed=0,1"
    (tmp_path / "multirun.yaml").write_text("- 1\n")
    assert sweep_command(tmp_path) is None
