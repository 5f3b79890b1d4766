"""The sentences below a table: how its numbers were scored, over which runs they are, and what was left out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from ptq_exp.reports.tables.cells import Cell
from ptq_exp.reports.tables.labels import label, letter, natural
from ptq_exp.reports.tables.request import REFERENCE, Request
from ptq_exp.results.missing import is_missing

INTERVALS = "in square brackets: 95 % interval over the images of a run (paired bootstrap), not over seeds"


def members_of(cells: Iterable[Cell]) -> str:
    """Name what tells the runs of some cells apart, once each: their seeds."""
    members = dict.fromkeys(member for cell in cells for member in cell.members)
    ordered = sorted(members, key=lambda member: [*map(natural, member)])
    return ", ".join("/".join(map(label, member)) for member in ordered)


def scored(
    cells: Sequence[Cell], specs: Sequence[str], counts: tuple[int, Sequence[int]], request: Request
) -> list[str]:
    """Return a sentence for each metric spec, and over which runs the numbers were averaged.

    Args:
        counts: the usual number of runs of a cell, and all of them.
    """
    over, (usual, found) = " and ".join(request.agg), counts
    notes = []
    for spec in specs:
        text = ", ".join(f"{key} {value}" for key, value in json.loads(spec).items()) or "no metric spec"
        members = members_of(cell for cell in cells if cell.spec == spec)
        notes.append(f"{letter(specs, spec) + ' ' if len(specs) > 1 else ''}{text}; {over} {members}")
    if found and max(found) > 1:
        differs = ", n where it is another number" if len(set(found)) > 1 else ""
        notes.append(f"mean ± std of n={usual} runs{differs}")
    if len(specs) > 1:
        notes.append("what was scored differently is neither averaged nor compared: see the column scored")
    if request.delta:
        notes.append(f"in brackets: difference to {REFERENCE} over the runs of the same {over}")
    return notes


def fate_of(runs: pd.DataFrame) -> list[str]:
    """Write notes that name the runs which did not finish, a note for each way of not finishing."""
    lost = runs[runs["status"] != "finished"]
    words = lost["status"].map(lambda status: "unfinished" if is_missing(status) or status == "running" else status)
    return [
        f"{word}: {'; '.join(map(_named, lost[words == word].to_dict('records')))}" for word in words.drop_duplicates()
    ]


def _named(row: Mapping[str, Any]) -> str:
    reason = row.get("stage") if is_missing(row.get("error")) else row["error"]
    if is_missing(reason):
        return row["run"]
    reason = " ".join(str(reason).split())
    return f"{row['run']} ({reason if len(reason) <= 100 else reason[:97] + '...'})"
