"""Averages over many runs and what identifies them; `result_table` is the more general tool."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pandas as pd

from ptq_exp.errors import ConfigError
from ptq_exp.reports.tables.identity import NO_EFFECT, SEED, SPEC, exact, metric_spec, newest, telling_apart, text_of
from ptq_exp.reports.tables.labels import letter
from ptq_exp.reports.tables.notation import is_missing, to_latex, to_markdown
from ptq_exp.reports.tables.runs import add_percent, collect, flatten

__all__ = [
    "APART", "NOTES", "add_percent", "aggregate", "aggregate_apart", "caption", "collect", "exact", "flatten",
    "metric_spec", "to_latex", "to_markdown",
]  # fmt: skip

NOTES = "notes"
"""Key of `DataFrame.attrs`: sentences about the runs that an average leaves out."""

APART = "apart"
"""Key of `DataFrame.attrs`: the settings that tell rows apart beside the columns asked for."""


def aggregate_apart(runs: pd.DataFrame, by: Sequence[str], values: Sequence[str], over: str = "seed") -> pd.DataFrame:
    """`aggregate`, with rows of their own for runs that agree in `by` and differ in other settings.

    Returns:
        As `aggregate`; `attrs[APART]` names the columns that were added to `by`, each plain values.
    """
    finished = runs[runs["status"] == "finished"]
    finished = finished.assign(**{SPEC: [metric_spec(row) for row in finished.to_dict("records")]})
    apart = telling_apart(finished, [*by, SPEC])
    runs = runs.assign(**{column: runs[column].map(text_of) for column in apart})
    table = aggregate(runs, [*by, *apart], values, over)
    notes = table.attrs[NOTES]
    table = table.assign(**{column: table[column].map(json.loads).astype(object) for column in apart})
    table.attrs |= {NOTES: notes, APART: apart}
    return table


def aggregate(
    runs: pd.DataFrame,
    by: Sequence[str],
    values: Sequence[str],
    over: str = "seed",
    *,
    ignore: Sequence[str] = NO_EFFECT,
) -> pd.DataFrame:
    """Mean and standard deviation of `values` over the finished runs of each group.

    Runs are grouped by `by` and by their metric_spec without its seed: numbers of different extractors,
    sample counts or references never meet in one average. Of several runs with the same group and seed the
    newest counts, so that a repeated run does not weigh twice.

    Args:
        runs: from `collect`.
        by: columns that name a table row, such as ["name"]; a missing value is a group of its own.
        values: columns to average, such as ["metrics.fid"].
        over: the column that tells the runs of one group apart.
        ignore: settings that may differ within a group, as the seed may; any other difference is an error.

    Returns:
        In order of first appearance, the columns of `by`, then "metric_spec" (JSON), "seeds" ("0, 1, 2"), and
        for each value v the columns v (mean) and f"{v}.std" (ddof=1; missing for a single run). Groups
        without a finished run have no seeds and missing values. `attrs[NOTES]` names repeated runs, and those that
        lack a value which others of their group have.

    Raises:
        ConfigError: an unknown column, or runs of one group that differ in a setting.
    """
    unknown = [column for column in [*by, over] if column not in runs]
    if unknown:
        near = ", ".join(sorted(str(column) for column in runs))
        raise ConfigError(f"no column {unknown[0]!r} in the results, expected one of: {near}")
    runs = runs.assign(**{SPEC: [metric_spec(row) for row in runs.to_dict("records")]})
    rows, notes = [], []
    for _, group in runs.groupby([*by, SPEC], dropna=False, sort=False):
        finished = group[group["status"] == "finished"]
        _same_settings(finished, by, ignore)
        finished, repeated = newest(finished, [over])
        finished = finished.sort_values(over)
        notes += repeated
        row = {column: group[column].iloc[0] for column in [*by, SPEC]}
        row["seeds"] = ", ".join(str(exact(seed)) for seed in finished[over])
        for value in values:
            numbers = pd.to_numeric(finished[value]) if value in finished else pd.Series(dtype=float)
            row[value], row[f"{value}.std"] = numbers.mean(), numbers.std()
            if numbers.notna().any() and numbers.isna().any():
                lacking = ", ".join(finished.loc[numbers.isna(), "run"])
                notes.append(f"no {value.partition('.')[2]} in {lacking}: the mean is that of the other runs")
        rows.append(row)
    table = pd.DataFrame(rows)
    table.attrs[NOTES] = notes
    return table


def _same_settings(group: pd.DataFrame, by: Sequence[str], ignore: Sequence[str]) -> None:
    """Refuse to average runs whose configuration differs in more than seed and execution."""
    for column in map(str, group):
        section, _, setting = column.partition(".")
        ignored = any(setting == name or setting.startswith(f"{name}.") for name in (SEED, *ignore))
        if section != "config" or column in by or ignored:
            continue
        found = {text_of(value) for value in group[column] if not is_missing(value)}
        if len(found) > 1 or (found and group[column].map(is_missing).any()):
            runs = ", ".join(group["run"])
            raise ConfigError(
                f"the runs {runs} would be averaged but differ in {column} ({', '.join(sorted(found))}): "
                f"add {column!r} to `by`, or its name to `ignore`, or read only the runs of a folder that agree"
            )


def scored_differently(table: pd.DataFrame) -> list[str]:
    """The metric specs of the rows that have finished runs, in order, where there are several."""
    specs = list(dict.fromkeys(table.loc[table["seeds"] != "", SPEC]))
    return specs if len(specs) > 1 else []


def caption(table: pd.DataFrame) -> str:
    """What identifies the numbers of an aggregated table: every metric_spec in it, and the seeds.

    One sentence per metric_spec, in order of appearance, with its letter where there are several.
    """
    sentences, specs = [], scored_differently(table)
    for text, rows in table.groupby(SPEC, sort=False):
        spec = ", ".join(f"{key} {value}" for key, value in json.loads(text).items()) or "no metric spec"
        seeds = "; ".join(dict.fromkeys(seeds for seeds in rows["seeds"] if seeds)) or "none finished"
        prefix = f"{letter(specs, text)} " if text in specs else ""
        sentences.append(f"{prefix}{spec}; seeds {seeds}.")
    return "\n".join(sentences)
