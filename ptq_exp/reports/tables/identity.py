"""What tells runs apart: the settings that change their numbers, and how their images were scored."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from ptq_exp.results.missing import is_missing

NO_EFFECT = (
    "name", "imports", "forecast", "cache", "cache_dir", "cache_lease", "save_quantized", "analysis", "logger",
    "trainer",
    "evaluation.batch_size", "evaluation.grid_images", "evaluation.resamples", "evaluation.fid_resamples",
    "evaluation.gate", "model.extractor", "reconstruction.cache_gb",
)
"""Settings that change no number of a run: how it is called, where and how it is executed and recorded.

Runs that differ in these alone are repetitions of one another in every table, and a sweep may be resumed with others.
Python modules of `imports` act through the settings that name what is in them.
"""
SEED = "seed"
"""The setting that runs are averaged over."""
SPEC = "metric_spec"
"""Column with the canonical JSON of how a run was scored."""


def has_effect(setting: str) -> bool:
    """Whether a setting, such as "sampler.steps", changes numbers; the seed is another question."""
    return setting != SEED and not any(setting == name or setting.startswith(f"{name}.") for name in NO_EFFECT)


def decides_numbers(setting: str) -> bool:
    """Whether two runs with different values of a setting may have different numbers: the seed is such a setting."""
    return setting == SEED or has_effect(setting)


def settings_of(columns: Iterable[Any]) -> list[str]:
    """Return the columns that hold settings which change numbers, without the seed."""
    named = [column for column in map(str, columns) if column.startswith("config.")]
    return [column for column in named if has_effect(column.removeprefix("config."))]


def telling_apart(runs: pd.DataFrame, known: Sequence[str]) -> list[str]:
    """Return the settings in which `runs` that agree in the columns `known` differ, as few as tell all of them apart.

    Of several that would do, the choice of a group (config.model.name) comes before what follows from it.
    """
    if runs.empty:
        return []
    classes, found = runs[list(known)].map(text_of).agg("\n".join, axis=1), []
    for column in sorted(settings_of(runs), key=lambda column: not column.endswith(".name")):
        values = runs[column].map(text_of)
        if (values.groupby(classes).nunique() > 1).any():
            classes = classes + "\n" + values
            found.append(column)
    return found


def newest(runs: pd.DataFrame, over: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """Return the newest of the `runs` that agree in the columns `over`, oldest first, and a note about the others."""
    runs = runs.sort_values("modified", kind="stable")
    repeated = runs[list(over)].map(text_of).agg("\n".join, axis=1).duplicated(keep="last") if over else (
        pd.Series([True] * (len(runs) - 1) + [False], index=runs.index)
    )
    if not repeated.any():
        return runs, []
    keys = " and ".join(column.removeprefix("config.") for column in over) or "nothing else"
    older = ", ".join(sorted(runs.loc[repeated, "run"]))
    return runs[~repeated], [f"several runs of one configuration and {keys}: the newest counts, not {older}"]


def metric_spec(row: Mapping[str, Any]) -> str:
    """Canonical JSON of a run's metric_spec without its seed."""
    prefix = f"{SPEC}."
    spec = {key.removeprefix(prefix): value for key, value in row.items() if str(key).startswith(prefix)}
    spec = {key: plain(value) for key, value in spec.items() if key != SEED and not is_missing(value)}
    return json.dumps(spec, sort_keys=True)


def plain(value: Any) -> Any:
    """Return a setting as it is compared and grouped: None for missing, 8 for 8.0, text for lists."""
    if is_missing(value):
        return None
    if isinstance(value, bool | str):
        return value
    if isinstance(value, list | dict):
        return json.dumps(value)
    return exact(value.item() if hasattr(value, "item") else value)


def text_of(value: Any) -> str:
    """Return a setting as text that is equal for equal values alone: 8 and 8.0 agree, 8 and "8", 1 and true do not."""
    return json.dumps(plain(value), default=str)


def exact(value: Any) -> Any:
    """2048.0 -> 2048: a column in which some run lacks the value has become float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
