"""One trial of a search: an ordinary run of the command in a process of its own, found again by its settings."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptq_exp.errors import DataError
from ptq_exp.settings.overrides import quoted

_running: set[subprocess.Popen] = set()


def trial_folder(folder: Path, overrides: Sequence[str]) -> Path:
    """Where the run with these settings lies below `folder`."""
    return folder / "trials" / hashlib.sha256("\n".join(overrides).encode()).hexdigest()[:16]


def run_trial(folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The results of a run with `overrides`: read if it has finished before, else run now.

    Returns:
        Its results.json; for a run that failed {"error": text}.
    """
    place = trial_folder(folder, overrides)
    if (found := _finished(place)) is not None:
        return found
    place.mkdir(parents=True, exist_ok=True)
    ours = [f"hydra.run.dir={quoted(str(place))}", "trainer.progress_bar=false"]
    command = [sys.executable, "-m", "ptq_exp", *overrides, *ours]
    environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | os.environ
    with (place / "output.txt").open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        _running.add(process)
        code = process.wait()
        _running.discard(process)
    if (found := _finished(place)) is not None:
        return found
    said = (place / "output.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return {"error": said[-1].removeprefix("error: ") if said else f"ended with code {code}"}


def stop_trials() -> None:
    """End the runs that are under way; what they have drawn stays for the next time."""
    for process in list(_running):
        process.terminate()


def _finished(place: Path) -> dict[str, Any] | None:
    from ptq_exp.storage.plain_json import read_json

    try:
        found = read_json(place / "results.json")
    except DataError:
        return None
    return found if found.get("status") == "finished" else None
