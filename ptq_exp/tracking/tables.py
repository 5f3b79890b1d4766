"""Averages over many runs and what identifies them; `result_table` is the more general tool."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ptq_exp.errors import ConfigError
from ptq_exp.tracking.notation import is_missing, to_latex, to_markdown
from ptq_exp.tracking.runs import add_percent, collect, flatten

__all__ = [
    "EXECUTION_SETTINGS", "add_percent", "aggregate", "caption", "collect", "exact", "flatten", "metric_spec",
    "to_latex", "to_markdown",
]  # fmt: skip

# Settings that may differ between the runs of one average: they change where and how a run is
# executed and recorded, not its numbers.
EXECUTION_SETTINGS = ("seed", "cache", "cache_dir", "logger", "trainer", "imports")


def aggregate(
    runs: pd.DataFrame,
    by: Sequence[str],
    values: Sequence[str],
    over: str = "seed",
    *,
    ignore: Sequence[str] = EXECUTION_SETTINGS,
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
        ignore: names below "config." that may differ within a group; any other difference is an error.

    Returns:
        In order of first appearance, the columns of `by`, then "metric_spec" (JSON), "seeds" ("0, 1, 2"), and
        for each value v the columns v (mean) and f"{v}.std" (ddof=1; missing for a single run). Groups
        without a finished run have no seeds and missing values.

    Raises:
        ConfigError: an unknown column, or runs of one group that differ in a setting.
    """
    unknown = [column for column in [*by, over] if column not in runs]
    if unknown:
        near = ", ".join(sorted(str(column) for column in runs))
        raise ConfigError(f"no column {unknown[0]!r} in the results, expected one of: {near}")
    runs = runs.assign(**{_SPEC: [metric_spec(row) for row in runs.to_dict("records")]})
    rows = []
    for _, group in runs.groupby([*by, _SPEC], dropna=False, sort=False):
        finished = group[group["status"] == "finished"].sort_values("modified")
        finished = finished.drop_duplicates(over, keep="last").sort_values(over)
        _same_settings(finished, by, ignore)
        row = {column: group[column].iloc[0] for column in [*by, _SPEC]}
        row["seeds"] = ", ".join(_plain_number(seed) for seed in finished[over])
        for value in values:
            numbers = pd.to_numeric(finished[value]) if value in finished else pd.Series(dtype=float)
            row[value], row[f"{value}.std"] = numbers.mean(), numbers.std()
        rows.append(row)
    return pd.DataFrame(rows)


_SPEC = "metric_spec"


def metric_spec(row: Mapping[str, Any]) -> str:
    """Canonical JSON of a run's metric_spec without its seed."""
    prefix = f"{_SPEC}."
    spec = {key.removeprefix(prefix): value for key, value in row.items() if str(key).startswith(prefix)}
    spec = {key: exact(value) for key, value in spec.items() if key != "seed" and not is_missing(value)}
    return json.dumps(spec, sort_keys=True)


def exact(value: Any) -> Any:
    """2048.0 -> 2048: a column in which some run lacks the value has become float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _plain_number(value: Any) -> str:
    return str(exact(value))


def _same_settings(group: pd.DataFrame, by: Sequence[str], ignore: Sequence[str]) -> None:
    """Refuse to average runs whose configuration differs in more than seed and execution."""
    for column in group:
        parts = str(column).split(".")
        if parts[0] != "config" or column in by or any(part in ignore for part in parts[1:]):
            continue
        found = {json.dumps(exact(value), default=str) for value in group[column] if not is_missing(value)}
        if len(found) > 1 or (found and group[column].map(is_missing).any()):
            runs = ", ".join(group["run"])
            raise ConfigError(
                f"the runs {runs} would be averaged but differ in {column} ({', '.join(sorted(found))}): "
                f"add {column!r} to `by`, or its name to `ignore`, or read only the runs of a folder that agree"
            )


def caption(table: pd.DataFrame) -> str:
    """What identifies the numbers of an aggregated table: every metric_spec in it, and the seeds.

    One sentence per metric_spec, in order of appearance.
    """
    sentences = []
    for text, rows in table.groupby(_SPEC, sort=False):
        spec = ", ".join(f"{key} {value}" for key, value in json.loads(text).items()) or "no metric spec"
        seeds = "; ".join(dict.fromkeys(seeds for seeds in rows["seeds"] if seeds)) or "none finished"
        sentences.append(f"{spec}; seeds {seeds}.")
    return "\n".join(sentences)
