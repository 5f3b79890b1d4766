"""Cells arranged in rows and columns: means, deviations, counts, differences to full precision, and the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from ptq_exp.reports.tables.cells import Cell, Key, difference
from ptq_exp.reports.tables.settings import Value, is_idle

RowKey = tuple[bool, Key, str]
"""Full precision or not, the choices of the row's keys, and the metric spec; "" for a row without finished runs."""


def shares(settings: Sequence[str], reference: Key, key: Key) -> bool:
    """Whether full-precision runs with `reference` are those of `key`: all settings but idle ones agree."""
    return all(is_idle(column) or r == k for column, r, k in zip(settings, reference, key, strict=True))


def arranged(
    cells: Sequence[Cell],
    rows: Sequence[RowKey],
    columns: Sequence[Key],
    values: Mapping[str, Value],
    settings: tuple[Sequence[str], Sequence[str]],
    block_of: Mapping[RowKey, Key],
) -> pd.DataFrame:
    """One row per row of the table; columns (kind, number of the column, value) with the kinds of `_KINDS`.

    A cell that no run fills is missing. Full-precision runs fill all columns that share their settings.

    Args:
        settings: the settings (columns of the runs) that choose rows and those that choose columns.
        block_of: rows with the same block, and scored alike, compete for the best.
    """
    long = pd.DataFrame(_entries(cells, rows, columns, values, settings), columns=["row", "column", "value", *_KINDS])
    long["best"] = _best(long, rows, values, block_of)
    wide = long.pivot(index="row", columns=["column", "value"], values=_KINDS)
    full = pd.MultiIndex.from_product([_KINDS, range(len(columns)), list(values)])
    return wide.reindex(index=range(len(rows)), columns=full)


_KINDS = ["mean", "std", "n", "delta", "best"]


def _entries(cells, rows, columns, values, settings) -> list[tuple]:
    """(row, column, value, mean, std, n, delta, best) of everything that was measured."""
    of_rows, of_columns = settings
    references = [cell for cell in cells if cell.full_precision]
    entries = []
    for cell in cells:
        row = rows.index((cell.full_precision, cell.row, cell.spec))
        for place, column in enumerate(columns):
            if cell.column != column and not (cell.full_precision and shares(of_columns, cell.column, column)):
                continue
            reference = None if cell.full_precision else next(
                (other for other in references if other.spec == cell.spec and shares(of_rows, other.row, cell.row)
                 and shares(of_columns, other.column, column)), None,
            )  # fmt: skip
            for name, value in values.items():
                if n := len(cell.numbers[name]):
                    deviation = cell.deviation(name, value.column.startswith("quantization."))
                    delta = difference(cell, reference, name) if reference else float("nan")
                    entries.append((row, place, name, cell.mean(name), deviation, n, delta, False))
    return entries


def _best(long: pd.DataFrame, rows, values, block_of) -> pd.Series:
    """Which entries are the best of those they can be compared with, unless all of these are equal."""
    sign = long["value"].map({name: value.better for name, value in values.items()}).astype(float)
    block = long["row"].map({i: repr((row[2], block_of[row])) for i, row in enumerate(rows)})
    competes = (sign != 0) & ~long["row"].map({i: row[0] for i, row in enumerate(rows)}).astype(bool)
    score = (long["mean"] * sign).where(competes)
    groups = score.groupby([long["column"], long["value"], block], dropna=False)
    top = groups.transform("max")
    return competes & (score == top) & (groups.transform("min") < top)
