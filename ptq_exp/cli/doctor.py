"""`python -m ptq_exp doctor`: is there all that experiments need? Each line: ok, warning or problem, with the fix."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ptq_exp.cli import checkups
from ptq_exp.cli.cache import default_folder, with_plain_options
from ptq_exp.cli.checkups import OK, PROBLEM, Finding
from ptq_exp.errors import command_line, one_line
from ptq_exp.storage.paths import PathArgument

_HELP = "Exit status 1 if there is a problem, 0 otherwise. Nothing is changed, and no network is used."


def main(argv: Sequence[str]) -> None:
    """Entry point; exits with 1 on a problem."""
    parser = argparse.ArgumentParser(prog="python -m ptq_exp doctor", description=__doc__, epilog=_HELP)
    add = parser.add_argument
    add("--cache-dir", action=PathArgument, metavar="PATH", help="default: cache_dir of conf/config.yaml")
    add("--runs", action=PathArgument, default=Path("runs"), metavar="PATH", help="where runs are written (runs)")
    with command_line():
        arguments = parser.parse_args(with_plain_options(argv))
        status = report(examination(arguments.cache_dir or default_folder(), arguments.runs))
    sys.exit(status)


def examination(cache_dir: Path, runs: Path) -> list[Callable[[], Iterable[Finding]]]:
    """Return the checks, in the order of the report."""
    return [
        checkups.python, checkups.packages, checkups.extras, checkups.devices,
        lambda: checkups.disk("runs", runs), lambda: checkups.disk("cache_dir", cache_dir), checkups.weights,
    ]


def report(checks: Iterable[Callable[[], Iterable[Finding]]]) -> int:
    """Print what the checks find, each line as soon as it is known; returns the exit status."""
    count = dict.fromkeys(checkups.LEVELS, 0)
    for check in checks:
        try:
            findings = list(check())
        except Exception as error:  # a broken library must not hide what the other checks find
            text = f"the check failed: {type(error).__name__}: {one_line(error)}"
            findings = [Finding(PROBLEM, text, "install ptq-exp again")]
        for finding in findings:
            count[finding.level] += 1
            fix = f"; {finding.fix}" if finding.fix else ""
            print(f"{finding.level:<8} {finding.text}{fix}", flush=True)
    print(", ".join(f"{n} {level}" for level, n in count.items() if n or level == OK))
    return int(count[PROBLEM] > 0)
