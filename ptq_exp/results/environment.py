"""What a run was made with: versions, machine, commit, and the command that makes it again."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from ptq_exp import __version__

_PACKAGES = ("torch", "diffusers", "numpy", "scipy", "pytorch-lightning")


def environment() -> dict[str, Any]:
    """Versions, platform, processor, threads and, in a git checkout, the commit, as plain values for results.json."""
    import torch  # not needed by reports, which only read what is written here

    found: dict[str, Any] = {"ptq_exp": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found |= {"platform": platform.platform(), "processor": processor(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    found["threads"] = torch.get_num_threads()
    if commit := git_commit(Path(__file__).parents[2]):
        found["commit"] = commit
    return found


def usable_cores() -> int:
    """Return the cores that this process may use, which a container or a batch system may limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def git_commit(checkout: Path) -> str | None:
    """Return the commit of a git checkout, with "+changes" where files differ from it; None for any other folder."""
    if not (checkout / ".git").exists():
        return None
    try:
        commit = _git(checkout, "rev-parse", "HEAD")
        changed = _git(checkout, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+changes" if changed else commit


def run_command(folder: Path) -> str:
    """Return the command that made the run in `folder`, from what Hydra left there."""
    overrides = _yaml(folder / ".hydra" / "overrides.yaml")
    return shlex.join(["python", "-m", "ptq_exp", *map(str, overrides if isinstance(overrides, list) else [])])


def sweep_command(folder: Path) -> str | None:
    """Return the command that made the sweep in `folder`; None where Hydra left nothing there."""
    settings = _yaml(folder / "multirun.yaml")
    try:
        overrides = settings["hydra"]["overrides"]["task"]
    except (KeyError, TypeError):
        return None
    return shlex.join(["python", "-m", "ptq_exp", "-m", *map(str, overrides)])


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return None


def _git(checkout: Path, *arguments: str) -> str:
    command = ["git", "-C", str(checkout), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def processor() -> str:
    """Return the processor's name; its architecture where the system does not say more."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
