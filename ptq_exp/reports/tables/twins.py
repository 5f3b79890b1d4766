"""The full-precision twins that quantized runs have scored, as runs beside them: a table needs no others for FP32."""

from __future__ import annotations

import json

import pandas as pd

from ptq_exp.reports.tables.identity import exact, plain, settings_of
from ptq_exp.reports.tables.settings import ACCOUNT, DERIVED, FULL_PRECISION, RATIOS, SPEC, is_idle

_OF_QUANTIZED = "config.quantized"  # a setting that, with the idle ones, the twin does not know of


def with_twins(runs: pd.DataFrame) -> pd.DataFrame:
    """`runs`, which `prepared` has seen, and the twin of each finished quantized run, once, marked as `DERIVED`."""
    columns = [*map(str, runs)]
    scores = {column: f"metrics.{column.removeprefix('fp32.')}" for column in columns if column.startswith("fp32.")}
    if not scores:
        return runs
    makers = runs[~runs[FULL_PRECISION] & (runs["status"] == "finished") & runs[list(scores)].notna().any(axis=1)]
    shared = [column for column in settings_of(columns) if not is_idle(column) and column != _OF_QUANTIZED]
    shared += [column for column in columns if column == "config.seed"]
    twins = {}
    for row in makers.to_dict("records"):
        twin = {column: row[column] for column in (*shared, SPEC, "seed", "run", "modified", "status") if column in row}
        twin |= {mine: row[its] for its, mine in scores.items()}
        twin |= {mine: exact(row[its]) for mine, its in ACCOUNT.items() if its in row} | dict.fromkeys(RATIOS, 1.0)
        key = json.dumps([plain(row[column]) for column in (*shared, SPEC)])
        twins.setdefault(key, twin | {FULL_PRECISION: True, DERIVED: True})
    if not twins:
        return runs
    added = pd.DataFrame(list(twins.values())).astype(object)
    both = pd.concat([runs.assign(**{DERIVED: False}).astype(object), added], ignore_index=True)
    return both.where(both.notna(), None).infer_objects()
