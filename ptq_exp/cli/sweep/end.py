"""What a sweep ends with: its jobs, the cache, its table, and the front where it searched bits per group."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ptq_exp.cli.sweep.record import SweepRecord, plain_key
from ptq_exp.cli.sweep.resume import RESUME
from ptq_exp.errors import DataError, PTQError
from ptq_exp.evaluation.gate import gate_line
from ptq_exp.results.record import INTERRUPTED
from ptq_exp.settings.overrides import to_type
from ptq_exp.storage.plain_json import read_json, write_json

DONE = ("finished", "infeasible")


def finish_sweep(folder: Path) -> tuple[list[str], list[str]]:
    """Print the end of the sweep in `folder`; returns the names of its failed jobs, and of those that miss the gate."""
    from ptq_exp.reports.html import write_sweep_report  # pandas and matplotlib take seconds
    from ptq_exp.reports.tables.sweep_table import sweep_table

    jobs = read_jobs(folder)
    if not jobs:
        return [], []
    print(f"\nsweep {folder}")
    swept = SweepRecord.load(folder).swept
    if any(key.startswith("bits.groups") for key in swept):
        from ptq_exp.cli.sweep.objectives import write_pareto  # matplotlib takes a second

        _show(lambda: write_pareto(folder, jobs, swept))
    else:
        _show(lambda: sweep_table(folder, swept))
    _show(lambda: f"report: {write_sweep_report(folder)}", "no report")
    print(cache_line(jobs))
    failed = {name: values for name, values in jobs.items() if values["status"] not in DONE}
    counts = Counter(values["status"] for values in jobs.values())
    print(f"{len(jobs)} jobs: {', '.join(f'{n} {status}' for status, n in counts.items())}")
    for name, values in failed.items():
        word = INTERRUPTED if values["status"] == INTERRUPTED else "failed"
        print(f"{word}: {name} ({_changed(values, swept)}): {values['error']}")
    if failed:
        print(f"again: python -m ptq_exp {to_type(RESUME, str(folder))}")
    missed = {name: line for name, values in jobs.items() if (line := gate_line(values.get("gate", {})))}
    for name, line in missed.items():
        print(f"{name} (seed {jobs[name]['seed']}): {line}", file=sys.stderr)
    return list(failed), list(missed)


def leave_interrupted(folder: Path) -> str:
    """Say in the results of jobs that seem to run that they were interrupted; returns how many jobs are done."""
    jobs = read_jobs(folder)
    for name, values in jobs.items():
        if values["status"] == "killed" and "stage" in values:  # its process was ended before it could say so
            said = {"status": INTERRUPTED, "error": "interrupted", "error_type": "Interrupted"}
            write_json(folder / name / "results.json", values | said)
    done = sum(values["status"] in DONE for values in jobs.values())
    return f"{done} of the {len(jobs)} jobs that were started are done"


def read_jobs(folder: Path) -> dict[str, dict[str, Any]]:
    """Folder name of each job -> its results, in the order of their numbers; one that was killed says so."""
    jobs = {}
    for path in sorted(folder.glob("[0-9]*_*"), key=lambda path: int(path.name.partition("_")[0])):
        try:
            values = read_json(path / "results.json")
        except DataError as error:
            values = {"status": "killed", "error": str(error)}
        if values["status"] == "running":
            values |= {"status": "killed", "error": f"it ended in the stage after {values['stage']}"}
        jobs[path.name] = values
    return jobs


def cache_line(jobs: dict[str, dict[str, Any]]) -> str:
    """Hits and misses of all jobs, in sum and by kind of artefact."""
    hits, misses = Counter(), Counter()
    for values in jobs.values():
        for kind, counts in values.get("cache", {}).get("kinds", {}).items():
            hits[kind] += counts["hits"]
            misses[kind] += counts["misses"]
    kinds = ", ".join(f"{kind} {hits[kind]}/{hits[kind] + misses[kind]}" for kind in hits | misses)
    total = hits.total() + misses.total()
    return f"cache: {hits.total()} of {total} artefacts reused" + (f" ({kinds})" if kinds else "")


def _changed(values: dict[str, Any], swept: list[str]) -> str:
    """Return the swept settings of a job, as far as it says."""
    overrides = [item for item in values.get("overrides", []) if plain_key(item) in swept]
    return " ".join(overrides) or values.get("name", "no results")


def _show(make: Callable[[], object], otherwise: str = "no table") -> None:
    """Print what `make` returns, or why it cannot: the results themselves are there."""
    try:
        print(make())
    except PTQError as error:
        print(f"{otherwise}: {error}")
