"""What happens around a sweep in the process that starts it: checks and a record before, the table after.

Hydra turns what a callback raises into a warning. So the start ends the command itself, and the end is called by the
command (`end_of_sweep`), which also happens when Hydra has raised.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

import ptq_exp.settings.compose  # noqa: F401  (its resolvers: the processes of a launcher import this module first)
from ptq_exp.cli.sweep.plugins import check_plugins
from ptq_exp.cli.sweep.record import FILE, SweepRecord
from ptq_exp.errors import PTQError
from ptq_exp.settings.overrides import quoted
from ptq_exp.storage.paths import with_home

_folders: list[tuple[Path, bool]] = []  # of the sweeps that were started, and whether their jobs run on this machine


class SweepCallback(Callback):
    """Named in conf/config.yaml."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Write out `~` in the run folder."""
        try:
            _expand(config, "hydra.run.dir")
        except PTQError as error:
            sys.exit(f"error: {error}")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse what cannot run, and leave sweep.json; that of a sweep which is resumed stays."""
        try:
            check_plugins(config)
            _expand(config, "hydra.sweep.dir")
            folder = Path(config.hydra.sweep.dir)
            if config.sweep.resume is None or not (folder / FILE).exists():
                SweepRecord.of(config).save(folder)
        except (OSError, ValueError) as error:
            sys.exit(f"error: {error}")
        _folders.append((folder, "submitit" not in config.hydra.launcher._target_))


def interrupted_sweep() -> str | None:
    """Say in the results of its running jobs that the sweep was interrupted; returns how it goes on (None without one).

    Launchers that hand jobs to a scheduler leave them running: the results of these are their own.
    """
    line = None
    while _folders:
        from ptq_exp.cli.sweep.end import leave_interrupted  # loads numpy: help does without

        folder, local = _folders.pop()
        jobs = leave_interrupted(folder) if local else "what the scheduler was given goes on"
        line = f"{jobs}; the rest: python -m ptq_exp sweep.resume={shlex.quote(str(folder))}"
    return line


def _expand(config: DictConfig, setting: str) -> None:
    """Write out `~` in a folder of Hydra's, also for the jobs, whose configuration Hydra composes anew."""
    folder = str(OmegaConf.select(config, setting))
    expanded = with_home(folder, setting)
    if expanded != folder:
        with read_write(config), open_dict(config):
            OmegaConf.update(config, setting, expanded)
            config.hydra.overrides.hydra.append(f"{setting}={quoted(expanded)}")


def end_of_sweep() -> tuple[list[str], list[str]]:
    """Print and write what a sweep that was started ends with.

    Returns:
        Its failed jobs, and those whose scores miss evaluation.gate; none without a sweep.
    """
    failed, missed = [], []
    if _folders:
        from ptq_exp.cli.sweep.end import finish_sweep  # loads numpy: help does without
    while _folders:
        its_failed, its_missed = finish_sweep(_folders.pop()[0])
        failed, missed = failed + its_failed, missed + its_missed
    return failed, missed
