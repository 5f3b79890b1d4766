"""The cells of a table: runs filtered, checked, freed of repetitions, averaged, and compared with each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan, nan
from typing import Any

import numpy as np
import pandas as pd

from ptq_exp.errors import ConfigError
from ptq_exp.reports.tables.columns import DERIVED, FULL_PRECISION, SPEC, Value, is_idle
from ptq_exp.reports.tables.identity import decides_numbers, newest, plain, text_of

_ROUNDING = 1e-9  # a relative deviation below this, of bit operations and sizes, is the rounding of equal numbers
Key = tuple[Any, ...]
RowKey = tuple[bool, Key, str]
"""Full precision or not, the choices of the row's keys, and the metric spec; "" for a row without finished runs."""


@dataclass
class Cell:
    """Hold the runs of one row and column that were scored alike.

    `numbers` holds a series for each value, indexed by what tells the runs apart (their seeds), without missing ones.
    `intervals` are those of a single run. `position` is that of its first run among all.
    """

    row: Key
    column: Key
    spec: str
    full_precision: bool
    numbers: dict[str, pd.Series] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    members: tuple[Key, ...] = ()
    position: int = 0

    def mean(self, value: str) -> float:
        """Average over the runs; NaN without any."""
        return float(self.numbers[value].mean())

    def deviation(self, value: str, counted: bool) -> float:
        """Return the standard deviation over the runs (ddof=1), NaN for a single one; of `counted`, if it is any."""
        if not np.isfinite(self.numbers[value]).all():  # of an infinite PSNR, for one
            return nan
        deviation = float(self.numbers[value].std())
        return nan if counted and deviation <= _ROUNDING * abs(self.mean(value)) else deviation


def chosen(runs: pd.DataFrame, where: Mapping[str, Sequence[Any]]) -> pd.DataFrame:
    """Select the runs whose column is one of the given values, for each column of `where` (None: a missing one).

    What has no effect in full precision does not exclude the runs of the full-precision model.
    """
    keep = pd.Series(True, index=runs.index)
    for column, allowed in where.items():
        fits = runs[column].map(lambda value, allowed=allowed: _among(plain(value), allowed))
        keep &= fits | runs[FULL_PRECISION] if is_idle(column) else fits
    return runs[keep.astype(bool)]


def _among(value: Any, allowed: Sequence[Any]) -> bool:
    # True == 1 in Python, but not here
    return any(value == plain(other) and isinstance(value, bool) == isinstance(other, bool) for other in allowed)


def make_cells(
    runs: pd.DataFrame, rows: Sequence[str], columns: Sequence[str], values: Mapping[str, Value], agg: Sequence[str]
) -> tuple[list[Cell], list[str]]:
    """Make the cells of the finished `runs`, which `prepared` has seen, and notes about repeated ones.

    Runs are grouped by the settings of `rows` and `columns` and by their metric spec. Of runs that agree in `agg`, too,
    the newest counts. Full-precision images that quantized runs scored count where there is no run of that model.

    Raises:
        ConfigError: the runs of a cell differ in a setting that is none of these (`DERIVED` ones alone: a note).
    """
    by = [*rows, *columns]
    keys = pd.DataFrame({column: runs[column].map(plain).astype(object) for column in dict.fromkeys([*by, *agg])})
    keys[SPEC], keys[FULL_PRECISION] = runs[SPEC], runs[FULL_PRECISION]
    cells, notes = [], []
    for _, index in keys.groupby([FULL_PRECISION, SPEC, *by], dropna=False, sort=False).groups.items():
        group = runs.loc[index].assign(**{column: keys.loc[index, column] for column in keys})
        group = group[~group[DERIVED]] if not group[DERIVED].all() else group
        try:
            _same_settings(group, {*by, *agg})
        except ConfigError as error:
            if not group[DERIVED].all():
                raise
            notes.append(f"no FP32 row: {error}")
            continue
        group, repeated = newest(group, agg)
        notes += repeated
        cells.append(_cell(group, rows, columns, values, agg))
        for name, value in values.items():
            members = zip(group["run"], cells[-1].members, strict=True)
            lacking = [run for run, member in members if member not in cells[-1].numbers[name].index]
            if lacking and len(lacking) < len(group):
                notes.append(f"no {value.heading} in {', '.join(lacking)}: the mean is that of the other runs")
    return cells, notes


def _cell(
    group: pd.DataFrame, rows: Sequence[str], columns: Sequence[str], values: Mapping[str, Value], agg: Sequence[str]
) -> Cell:
    first = group.iloc[0]
    members = [tuple(row) for row in group[list(agg)].to_numpy(dtype=object)]
    cell = Cell(
        tuple(plain(first[column]) for column in rows), tuple(plain(first[column]) for column in columns),
        first[SPEC], bool(first[FULL_PRECISION]), members=tuple(members), position=int(min(group.index)),
    )
    for name, value in values.items():
        numbers = group.get(value.column, pd.Series(dtype=float, index=group.index))
        series = pd.to_numeric(numbers, errors="coerce").astype(float) * value.factor
        cell.numbers[name] = series.set_axis(pd.Index(members, tupleize_cols=False, dtype=object)).dropna()
        interval = first.get(value.interval)
        if len(group) == 1 and isinstance(interval, list):
            cell.intervals[name] = (interval[0] * value.factor, interval[1] * value.factor)
    return cell


def _same_settings(group: pd.DataFrame, allowed: Iterable[str]) -> None:
    """Refuse to average runs whose configuration differs in more than `allowed` and how they were executed."""
    for column in map(str, group):
        section, _, key = column.partition(".")
        if section != "config" or column in allowed or not decides_numbers(key):
            continue
        found = {text_of(value) for value in group[column]}
        if len(found) > 1:
            values = ", ".join(sorted(found))
            raise ConfigError(
                f"the runs {', '.join(group['run'])} would be averaged but differ in {key} ({values}): add {key} to "
                f"rows, cols or agg, or choose with where: {key}=..."
            )


@dataclass
class Entry:
    """Hold what is shown of a cell; `n` counts runs, `delta` is the mean difference to full precision.

    `low` and `high` are the 95 % interval of a single run. A cell that no run fills has no entry.
    """

    mean: float = nan
    std: float = nan
    n: int | None = None
    delta: float = nan
    best: bool = False
    low: float = nan
    high: float = nan


def shares(settings: Sequence[str], reference: Key, key: Key) -> bool:
    """Return whether full-precision runs with `reference` are those of `key`: all settings but idle ones agree."""
    return all(is_idle(column) or r == k for column, r, k in zip(settings, reference, key, strict=True))


def entries(
    cells: Sequence[Cell],
    rows: Sequence[RowKey],
    columns: Sequence[Key],
    values: Mapping[str, Value],
    settings: tuple[Sequence[str], Sequence[str]],
    block_of: Mapping[RowKey, Key],
) -> dict[tuple[int, int, str], Entry]:
    """Compute what is shown, by the number of the row, the number of the column, and the value.

    Full-precision runs fill all columns that share their settings.

    Args:
        settings: the settings (columns of the runs) that choose rows and those that choose columns.
        block_of: rows with the same block, and scored alike, compete for the best.
    """
    found = {}
    competing = defaultdict(list)
    for cell in cells:
        key = (cell.full_precision, cell.row, cell.spec)
        for place, column in enumerate(columns):
            if cell.column != column and not (cell.full_precision and shares(settings[1], cell.column, column)):
                continue
            reference = None if cell.full_precision else _reference(cell, cells, column, settings)
            for name, value in values.items():
                if n := len(cell.numbers[name]):
                    deviation = cell.deviation(name, value.column.startswith("quantization."))
                    # over the runs that both have: the same seeds
                    delta = float((cell.numbers[name] - reference.numbers[name]).mean()) if reference else nan
                    entry = found[rows.index(key), place, name] = Entry(
                        cell.mean(name), deviation, n, delta, False, *cell.intervals.get(name, (nan, nan))
                    )
                    if value.better and not cell.full_precision and not isnan(entry.mean):
                        competing[place, name, cell.spec, repr(block_of[key])].append(entry)
    for (_, name, *_), several in competing.items():
        scores = [values[name].better * entry.mean for entry in several]
        for entry, score in zip(several, scores, strict=True):
            entry.best = min(scores) < score == max(scores)
    return found


def _reference(
    cell: Cell, cells: Sequence[Cell], column: Key, settings: tuple[Sequence[str], Sequence[str]]
) -> Cell | None:
    """Return the first cell of full-precision runs in `column` that were drawn and scored as those of `cell`."""
    fitting = (
        other for other in cells
        if other.full_precision and other.spec == cell.spec and shares(settings[0], other.row, cell.row)
        and shares(settings[1], other.column, column)
    )
    return next(fitting, None)
