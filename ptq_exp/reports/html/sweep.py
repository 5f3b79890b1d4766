"""The report of a sweep: report.html over all runs below its folder."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import pandas as pd

from ptq_exp.reports.html.compare import MEASURED, SETTINGS, groups, with_readable_units
from ptq_exp.reports.html.page import NAME, write_page
from ptq_exp.reports.html.pareto import pareto_section
from ptq_exp.reports.html.section import Section
from ptq_exp.reports.html.table import Cell, Table, number, text
from ptq_exp.reports.tables.tables import NOTES, collect
from ptq_exp.results.environment import sweep_command
from ptq_exp.results.record import INTERRUPTED


def write_sweep_report(folder: Path) -> Path:
    """Write report.html over all runs below `folder` and return its path.

    Raises:
        DataError: there is no results.json below `folder`.
        PTQError: the report cannot be written.
    """
    runs = with_readable_units(collect(folder))
    status = runs["status"].value_counts()
    subtitle = f"{len(runs)} runs: " + ", ".join(f"{count} {name}" for name, count in status.items())
    averaged = groups(runs)
    found = [pareto_section(averaged, runs), _compared(averaged), _runs(runs, folder), _failures(runs),
             _reproduce(runs, folder)]  # fmt: skip
    return write_page(
        folder, "report.html.j2", title=f"Sweep {folder.resolve().name}", subtitle=subtitle, tiles=[],
        sections=[section for section in found if section is not None],
    )  # fmt: skip


def _compared(averaged: pd.DataFrame) -> Section | None:
    """One row per combination of settings, mean ± standard deviation over its seeds."""
    if averaged.empty:
        return None
    settings = averaged.attrs[SETTINGS]
    values = [column for column in MEASURED if averaged[column].notna().any()]
    columns = [*((_heading(column), False) for column in settings), ("seeds", False)]
    columns += [(MEASURED[column][0], True) for column in values]
    rows = [
        [
            *(text(row[column]) for column in settings), text(row["seeds"]),
            *(number(row[column], MEASURED[column][1], _deviation(row, column)) for column in values),
        ]
        for row in averaged.to_dict("records")
    ]  # fmt: skip
    note = "Mean ± standard deviation over seeds, of finished runs; of a repeated run the newest counts."
    note = " ".join([note, *(f"{sentence}." for sentence in averaged.attrs[NOTES])])
    table = Table(columns, rows, "Settings compared", note=note)
    return Section("compared", "Settings compared", tables=[table])


def _runs(runs: pd.DataFrame, folder: Path) -> Section:
    """Every run, with a link to its report, or to its folder where it has none."""
    values = [column for column in MEASURED if column in runs and runs[column].notna().any()]
    columns = [("run", False), ("experiment", False), ("model", False), ("bits", False), ("seed", True),
               ("status", False), *((MEASURED[column][0], True) for column in values)]  # fmt: skip
    rows = []
    for row in runs.to_dict("records"):
        own = row["run"] != "." and (folder / row["run"] / NAME).is_file()
        link = None if row["run"] == "." else quote(f"{row['run']}/{NAME if own else ''}")
        rows.append([
            Cell(row["run"], row["run"], link=link), text(row.get("name")), text(row.get("config.model.name")),
            text(row.get("config.bits.name")), number(row.get("seed"), "{:.0f}"), text(row["status"]),
            *(number(row[column], MEASURED[column][1]) for column in values),
        ])  # fmt: skip
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
    """The command of the sweep, and the environment: every value that its runs had."""
    command, prefix, rows = sweep_command(folder), "environment.", []
    for column in (column for column in runs if str(column).startswith(prefix)):
        found = runs[column].dropna()
        known = dict.fromkeys(str(int(v)) if isinstance(v, float) and v.is_integer() else str(v) for v in found)
        rows.append([text(column.removeprefix(prefix)), text(", ".join(known))])
    if command is None and not rows:
        return None
    tables = [Table([("", False), ("", False)], rows, "Environment", sortable=False, head=False)] if rows else []
    return Section("reproduce", "How to reproduce it", code=[command] if command else [], tables=tables)


def _deviation(row: dict, column: str) -> float | None:
    """Over seeds; coverage and bit operations do not depend on them."""
    return None if column.startswith("quantization.") else row[f"{column}.std"]


def _heading(column: str) -> str:
    return "experiment" if column == "name" else column.removeprefix("config.").removesuffix(".name")
