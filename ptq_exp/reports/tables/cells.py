"""The cells of a table: runs filtered, checked, freed of repetitions and averaged, and notes of what was left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from ptq_exp.errors import ConfigError
from ptq_exp.reports.tables.identity import decides_numbers, newest, plain, text_of
from ptq_exp.reports.tables.settings import DERIVED, FULL_PRECISION, SPEC, Value, is_idle

_ROUNDING = 1e-9  # a relative deviation below this, of bit operations and sizes, is the rounding of equal numbers
Key = tuple[Any, ...]


@dataclass
class Cell:
    """The runs of one row and column that were scored alike.

    `numbers` holds a series for each value, indexed by what tells the runs apart (their seeds), without missing ones.
    `position` is that of its first run among all.
    """

    row: Key
    column: Key
    spec: str
    full_precision: bool
    numbers: dict[str, pd.Series] = field(default_factory=dict)
    members: tuple[Key, ...] = ()
    position: int = 0

    def mean(self, value: str) -> float:
        """Mean over the runs; NaN without any."""
        return float(self.numbers[value].mean())

    def deviation(self, value: str, accounted: bool) -> float:
        """Standard deviation over the runs (ddof=1), NaN for a single one; of what is `accounted`, if it is any."""
        if not np.isfinite(self.numbers[value]).all():  # of an infinite PSNR, for one
            return float("nan")
        deviation = float(self.numbers[value].std())
        return float("nan") if accounted and deviation <= _ROUNDING * abs(self.mean(value)) else deviation


def chosen(runs: pd.DataFrame, where: Mapping[str, Sequence[Any]]) -> pd.DataFrame:
    """The runs whose column is one of the given values, for each column of `where` (None: a missing one).

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
    """The cells of the finished `runs`, which `prepared` has seen, and notes about repeated ones.

    Runs are grouped by the settings of `rows` and `columns` and by their metric spec. Of runs that agree in `agg`, too,
    the newest counts. Twins that quantized runs scored count where there is no run of the full-precision model.

    Raises:
        ConfigError: the runs of a cell differ in a setting that is none of these (twins alone: there is a note).
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
    )  # fmt: skip
    for name, value in values.items():
        numbers = group.get(value.column, pd.Series(dtype=float, index=group.index))
        series = pd.to_numeric(numbers, errors="coerce").astype(float) * value.factor
        cell.numbers[name] = series.set_axis(pd.Index(members, tupleize_cols=False, dtype=object)).dropna()
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


def difference(cell: Cell, reference: Cell, value: str) -> float:
    """Mean difference to the reference over the runs that both have (the same seeds); NaN without any."""
    return float((cell.numbers[value] - reference.numbers[value]).mean())
