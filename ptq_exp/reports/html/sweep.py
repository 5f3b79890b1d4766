"""The report of a sweep: report.html over all runs below its folder."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import pandas as pd

from ptq_exp.errors import DataError
from ptq_exp.reports.html.page import NAME, write_page
from ptq_exp.reports.html.pareto import pareto_section
from ptq_exp.reports.html.section import Section
from ptq_exp.reports.html.table import Cell, Table, listing, number, text
from ptq_exp.reports.tables.columns import HEADLINE_VALUES, VALUES
from ptq_exp.reports.tables.request import BY_RUN, Request, ResultTable
from ptq_exp.reports.tables.result_table import result_table
from ptq_exp.reports.tables.runs import collect
from ptq_exp.results.environment import sweep_command
from ptq_exp.results.missing import is_missing
from ptq_exp.results.record import INTERRUPTED

SHOWN = [*HEADLINE_VALUES, "coverage_percent", "bops_g", "bops_ratio"]
"""The values in the tables of the report, as far as its runs have them."""


def write_sweep_report(folder: Path) -> Path:
    """Write report.html over all runs below `folder` and return its path.

    Raises:
        DataError: there is no results.json below `folder`.
        PTQError: the report cannot be written.
    """
    runs = collect(folder)
    status = runs["status"].value_counts()
    subtitle = f"{len(runs)} runs: " + ", ".join(f"{count} {name}" for name, count in status.items())
    table = compared(runs)
    found = [table and pareto_section(table, runs), table and _compared(table), _runs(runs, folder), _failures(runs),
             _reproduce(runs, folder)]
    return write_page(
        folder, title=f"Sweep {folder.resolve().name}", subtitle=subtitle, tiles=[],
        sections=[section for section in found if section is not None],
    )


def compared(runs: pd.DataFrame) -> ResultTable | None:
    """Average the finished `runs` over seeds: a row per experiment, in as many rows as its runs differ in settings.

    Returns:
        None where none has finished.
    """
    keys = ["name", *(["model"] if "config.model.name" in runs else [])]
    try:
        return result_table(
            runs[runs["status"] == "finished"], Request(rows=keys, values=SHOWN, apart=True, sort=BY_RUN)
        )
    except DataError:
        return None


def _compared(table: ResultTable) -> Section:
    """One row per combination of settings, mean ± standard deviation over its seeds."""
    frame, keys = table.frame, [key for key in table.keys if key != "model" or table.frame[key].nunique() > 1]
    values = [name for name in SHOWN if frame[name].notna().any()]
    columns = [*(("experiment" if key == "name" else key, False) for key in keys), ("seeds", False)]
    columns += [(VALUES[name].heading, True) for name in values]
    rows = [
        [
            *(text(row[key]) for key in keys), text(seeds),
            *(number(row[name], _form(name), row[f"{name}.std"], _interval(row, name)) for name in values),
        ]
        for row, (_, seeds) in zip(frame.to_dict("records"), table.rows, strict=True)
    ]
    note = " ".join(["Mean ± standard deviation over seeds, of finished runs.", *(f"{one}." for one in table.notes)])
    return Section("compared", "Settings compared", tables=[Table(columns, rows, "Settings compared", note=note)])


def _runs(runs: pd.DataFrame, folder: Path) -> Section:
    """Every run, with a link to its report, or to its folder where it has none."""
    values = [name for name in SHOWN if VALUES[name].column in runs and runs[VALUES[name].column].notna().any()]
    columns = [("run", False), ("experiment", False), ("model", False), ("bits", False), ("seed", True),
               ("status", False), *((VALUES[name].heading, True) for name in values)]
    rows = []
    for row in runs.to_dict("records"):
        own = row["run"] != "." and (folder / row["run"] / NAME).is_file()
        link = None if row["run"] == "." else quote(f"{row['run']}/{NAME if own else ''}")
        rows.append([
            Cell(row["run"], row["run"], link=link), text(row.get("name")), text(row.get("config.model.name")),
            text(row.get("config.bits.name")), number(row.get("seed"), "{:.0f}"), text(row["status"]),
            *(number(_scaled(row, name), _form(name)) for name in values),
        ])
    return Section("runs", "Runs", tables=[Table(columns, rows, "Runs")])


def _failures(runs: pd.DataFrame) -> Section | None:
    if "error" not in runs:
        return None
    failed = runs[runs["status"].isin(["failed", INTERRUPTED]) & runs["error"].notna()]
    if failed.empty:
        return None
    rows = [[text(row["run"]), text(row["stage"]), text(row["error"])] for row in failed.to_dict("records")]
    columns = [("run", False), ("stage", False), ("error", False)]
    title = "Failed and interrupted runs"
    return Section("failures", title, tables=[Table(columns, rows, title)])


def _reproduce(runs: pd.DataFrame, folder: Path) -> Section | None:
    """Return the command of the sweep, and the environment: every value that its runs had."""
    command, prefix, rows = sweep_command(folder), "environment.", []
    for column in (column for column in runs if str(column).startswith(prefix)):
        found = runs[column].dropna()
        known = dict.fromkeys(str(int(v)) if isinstance(v, float) and v.is_integer() else str(v) for v in found)
        rows.append([text(column.removeprefix(prefix)), text(", ".join(known))])
    if command is None and not rows:
        return None
    tables = [listing(rows, "Environment")] if rows else []
    return Section("reproduce", "How to reproduce it", code=[command] if command else [], tables=tables)


def _scaled(row: dict, name: str) -> float | None:
    """Return a value of one run in the unit of its column."""
    found = row[VALUES[name].column]
    return None if is_missing(found) else float(found) * VALUES[name].factor


def _interval(row: dict, name: str) -> tuple[float, float] | None:
    """Return the 95 % interval of a single run, of a row of a `ResultTable`."""
    return (row[f"{name}.low"], row[f"{name}.high"]) if f"{name}.low" in row else None


def _form(name: str) -> str:
    return f"{{:.{VALUES[name].digits}f}}"
