"""The table that ends a sweep: a row for each choice of the swept settings, the best marked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import compress

import pandas as pd

from ptq_exp.reports.tables.columns import HEADLINE_VALUES, VALUES, value_of
from ptq_exp.reports.tables.identity import plain
from ptq_exp.reports.tables.render import render
from ptq_exp.reports.tables.request import Request, ResultTable
from ptq_exp.reports.tables.result_table import result_table
from ptq_exp.reports.tables.runs import gather


def sweep_table(folder: str | os.PathLike, keys: Sequence[str]) -> str:
    """Return the runs below `folder`, mean ± std over seeds: a row per choice of `keys`, the best row marked.

    It shows the scores of the headline and the bit operations, as far as a run has them; the first of these that has a
    better side chooses the marked row.

    Args:
        folder: of the sweep; it is searched for results.json.
        keys: what was swept, as on the command line ("bits", "calibration.n_samples", "seed", "+experiment"); seed is
            averaged over, experiments are distinguished by their names.

    Raises:
        PTQError: there are no results, an unknown key or value, or runs that differ in a setting that is no key.
    """
    runs = gather([folder])
    values = _present(runs)
    names = [key.lstrip("+~").partition("@")[0] for key in keys]
    names = ["name" if name == "experiment" else name for name in names]
    rows = [name for name in dict.fromkeys(names) if name != "seed"] or ["name"]
    table = result_table(runs, Request(rows=rows, values=values, best_of_all=True))
    return render(_marked(table, next((name for name in values if value_of(name, runs).better), None)))


def _present(runs: pd.DataFrame) -> list[str]:
    names = [*HEADLINE_VALUES, "bops_ratio"]
    there = [VALUES[name].column in runs and runs[VALUES[name].column].notna().any() for name in names]
    return list(compress(names, there)) or ["fid"]


def _marked(table: ResultTable, best: str | None) -> ResultTable:
    """`table` with a column that says which row is the best in `best`; unchanged where none is."""
    marks = table.frame.get(f"{best}.best")
    if marks is None or not marks.any():
        return table
    heading = VALUES[best].heading if best in VALUES else best
    frame = table.frame.assign(best=[f"← best {heading}" if plain(mark) else "" for mark in marks])
    return replace(table, frame=frame, titles=table.titles | {"best": ""})
