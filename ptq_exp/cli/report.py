"""Write report.html of finished runs and of sweeps again: `python -m ptq_exp report runs/sweeps/<time>`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ptq_exp.errors import DataError, command_line
from ptq_exp.reports.html import write_run_report, write_sweep_report
from ptq_exp.storage.paths import PathArgument
from ptq_exp.storage.plain_json import read_json


def write_reports(folder: Path) -> list[Path]:
    """Write the report of the run in `folder`; or those of all finished runs below it, and one over all runs.

    Raises:
        DataError: `folder` holds no run.
        PTQError: a report cannot be written.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name that of a run or of a sweep")
    if (folder / "results.json").exists():
        return [write_run_report(folder)]
    finished = [path.parent for path in sorted(folder.rglob("results.json")) if _finished(path)]
    return [*map(write_run_report, finished), write_sweep_report(folder)]


def _finished(path: Path) -> bool:
    try:
        return read_json(path)["status"] == "finished"
    except (DataError, KeyError, TypeError):  # the report of the sweep says which
        return False


def main(argv: list[str] | None = None) -> None:
    """Entry point; exit code 1 and one line on standard error for anything the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m ptq_exp report", description=__doc__)
    help_text = "of a run (it holds results.json), or of a sweep"
    parser.add_argument("folders", nargs="+", action=PathArgument, help=help_text)
    with command_line():
        for folder in parser.parse_args(argv).folders:
            for path in write_reports(folder):
                print(path)
