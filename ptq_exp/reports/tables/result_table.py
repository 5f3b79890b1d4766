"""A table by configuration keys: a row and a column per choice, mean ± std over seeds, best in bold, and its notes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import inf, isnan
from typing import Any

import pandas as pd

from ptq_exp.errors import DataError
from ptq_exp.reports.tables.cells import Cell, Entry, Key, RowKey, chosen, entries, make_cells, shares
from ptq_exp.reports.tables.columns import (
    BITS,
    DERIVED,
    FULL_PRECISION,
    SPEC,
    VALUES,
    Value,
    is_idle,
    key_column,
    prepared,
    value_of,
    with_references,
)
from ptq_exp.reports.tables.identity import plain, telling_apart
from ptq_exp.reports.tables.labels import condition, label, letter, natural, word
from ptq_exp.reports.tables.notes import INTERVALS, fate_of, members_of, scored
from ptq_exp.reports.tables.request import BY_RUN, REFERENCE, PublishedRow, Request, ResultTable, published_keys

_ARROWS = {-1: " ↓", 0: "", 1: " ↑"}


def result_table(runs: pd.DataFrame, request: Request, settings: Iterable[str] = ()) -> ResultTable:
    """Return the table that `request` describes, made of `runs` (see `gather`).

    Runs of different metric specs, the seed aside, never meet in one cell: each spec has rows of its own. The runs of
    the full-precision model are one row for each choice of model, sampler and evaluation, in all columns that share it.

    Args:
        settings: columns (config.…) that are valid even where no run has them.

    Raises:
        ConfigError: an unknown key or value, or runs that differ in another setting would be averaged.
        DataError: there is no experiment among the runs, or none passes the filter.
    """
    return _Builder(runs, request, settings).table()


def _row_of(cell: Cell) -> RowKey:
    return cell.full_precision, cell.row, cell.spec


class _Builder:
    """The steps from runs to a table; what is noticed on the way goes into `notes`."""

    def __init__(self, runs: pd.DataFrame, request: Request, settings: Iterable[str]) -> None:
        columns = {*map(str, runs), *settings, "name"}
        self.request = request
        self.keys = list(request.rows)
        self.rows = [key_column(key, columns) for key in request.rows]
        self.cols = [key_column(key, columns) for key in request.cols]
        agg = [key_column(key, columns) for key in request.agg]
        where = {key_column(key, columns): list(allowed) for key, allowed in request.where.items()}
        self.values: dict[str, Value] = {name: value_of(name, columns) for name in request.values}
        runs, self.lost = self._experiments(runs, [*self.rows, *self.cols, *agg, *where])
        runs = self._asked_for(runs, where)
        finished = runs["status"] == "finished"
        if request.apart:
            self._tell_apart(runs[finished & ~runs[DERIVED]].drop(columns=set(agg) & set(runs)))
        computed = dict(self.values)
        if request.sort not in ("", BY_RUN):
            computed |= {request.sort: value_of(request.sort, columns)}
        self.better = {name: value.better for name, value in computed.items()}
        self.cells, self.notes = make_cells(runs[finished], self.rows, self.cols, computed, agg)
        self.unfinished = runs[~finished]
        self.order = self._choices_in_order(where)

    def _asked_for(self, runs: pd.DataFrame, where: Mapping[str, Sequence[Any]]) -> pd.DataFrame:
        """Return the runs that pass the filter, with or without full precision."""
        runs = chosen(runs, where)
        runs = with_references(runs) if self.request.fp32 else runs[~runs[FULL_PRECISION]]
        if runs.empty:
            filters = ", ".join(map(condition, self.request.where.items()))
            none_left = f"none of the runs passes the filter ({filters})"
            if not self.request.published:
                raise DataError(none_left)
            self.lost.insert(0, none_left)
        return runs

    def _tell_apart(self, runs: pd.DataFrame) -> None:
        """Add keys to the rows until no two `runs` of a cell differ in a setting."""
        added = telling_apart(runs, [*self.rows, *self.cols, SPEC, FULL_PRECISION])
        self.rows += added
        self.keys += [column.removeprefix("config.").removesuffix(".name") for column in added]

    def _choices_in_order(self, where: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Column -> its choices in the order of the filter, else of the labels, else of the published figures."""
        order = {column: [plain(value) for value in allowed] for column, allowed in where.items()}
        for column, key in zip(self.rows, self.request.rows, strict=False):
            labelled = dict.fromkeys(one.where[key] for one in self.request.labels if one.key == key)
            order.setdefault(column, list(labelled) or published_keys(self.request.published, key))
        return order

    def _experiments(self, runs: pd.DataFrame, settings: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
        """Return the prepared runs that say what they are, and notes about those that do not."""
        known = runs[BITS].notna() if BITS in runs else pd.Series(False, index=runs.index)
        notes = fate_of(runs[~known])
        others = runs[~known & (runs["status"] == "finished")]
        if len(others):
            notes.append(f"no experiments, left out: {', '.join(others['run'])}")
        if not known.any() and not self.request.published:
            raise DataError("none of the runs says with which bits it was made: run an experiment first")
        return prepared(runs[known].reset_index(drop=True), settings), notes

    def table(self) -> ResultTable:
        specs = list(dict.fromkeys(cell.spec for cell in self.cells))
        rows, columns = self._row_keys(specs), self._columns()
        frame = self._texts(rows, specs)
        blocks = [*self.request.blocks, *self.keys[len(self.request.rows):]] if self.request.blocks else []
        members = [(row[0], members_of(cell for cell in self.cells if _row_of(cell) == row)) for row in rows]
        table = ResultTable(frame, {name: name for name in frame}, {}, {}, [], self.request.title, blocks, members)
        counts = [len(numbers) for cell in self.cells for numbers in cell.numbers.values() if len(numbers)]
        usual = max(set(counts), key=lambda n: (counts.count(n), n)) if counts else 0
        numbers = self._measured(table, rows, columns, usual) | self._published(table, rows)
        table.notes.extend(scored(self.cells, specs, (usual, counts), self.request))
        if any(name.endswith(".low") for name in numbers):
            table.notes.append(INTERVALS)
        table.notes.extend([*self.notes, *fate_of(self.unfinished), *self.lost])
        table.notes.extend(
            f"{entry.heading}: {entry.source}; published, not measured here" for entry in self.request.published
        )
        return replace(table, frame=pd.concat([frame, pd.DataFrame(numbers, index=frame.index)], axis=1))

    def _measured(
        self, table: ResultTable, rows: Sequence[RowKey], columns: Sequence[Key], usual: int
    ) -> dict[str, pd.Series]:
        """Columns of `frame` with what was measured; their headings go into `table`."""
        blocks = {row: self._block(row[1]) for row in rows}
        filled = entries(self.cells, rows, columns, self.values, (self.rows, self.cols), blocks)
        numbers = {}
        for i, column in enumerate(columns):
            group = ", ".join(label(value, REFERENCE) for value in column)
            for name, value in self.values.items():
                place = f"{group}/{name}" if group else name
                shown = [filled.get((row, i, name), Entry()) for row in range(len(rows))]
                numbers[place] = pd.Series([entry.mean for entry in shown], dtype=float)
                numbers[f"{place}.std"] = pd.Series([entry.std for entry in shown], dtype=float)
                numbers[f"{place}.runs"] = pd.Series([entry.n for entry in shown], dtype="Int64")
                unusual = [None if entry.n == usual else entry.n for entry in shown]
                numbers[f"{place}.n"] = pd.Series(unusual, dtype=float)
                numbers[f"{place}.best"] = pd.Series([entry.best for entry in shown], dtype=bool)
                if not all(isnan(entry.low) for entry in shown):
                    numbers[f"{place}.low"] = pd.Series([entry.low for entry in shown], dtype=float)
                    numbers[f"{place}.high"] = pd.Series([entry.high for entry in shown], dtype=float)
                if self.request.delta:
                    numbers[f"{place}.delta"] = pd.Series([entry.delta for entry in shown], dtype=float)
                table.titles[place], table.groups[place] = value.heading + _ARROWS[value.better], group
                table.digits[place] = value.digits
        return numbers

    def _columns(self) -> list[Key]:
        """Return the choices of the columns, in order; those of full-precision runs only where no other has them."""
        found = {cell.column for cell in self.cells if not cell.full_precision}
        found |= {self._key(row, self.cols) for row in self.unfinished.to_dict("records") if not row[FULL_PRECISION]}
        for cell in self.cells:
            if cell.full_precision and not any(shares(self.cols, cell.column, c) for c in found):
                found.add(cell.column)
        return sorted(found or ({()} if not self.cols else set()), key=lambda key: self._place(key, self.cols, False))

    def _row_keys(self, specs: Sequence[str]) -> list[RowKey]:
        """(full precision, choices, spec) of the rows, in order; an unfinished or published one has the spec ""."""
        found = {_row_of(cell) for cell in self.cells}
        empty = [(bool(row[FULL_PRECISION]), self._key(row, self.rows)) for row in self.unfinished.to_dict("records")]
        for entry in self.request.published:
            empty += [(row.fp32, self._published_key(row)) for row in entry.rows]
        there = {row[:2] for row in found}
        found |= {(*row, "") for row in empty if row not in there}
        ordered = sorted(found, key=lambda row: (*self._place(row[1], self.rows, row[0]), [*specs, ""].index(row[2])))
        return sorted(ordered, key=self._rank) if self.request.sort else ordered

    def _rank(self, row: RowKey) -> tuple:
        """Sort key: full precision first, rows without finished runs last, between them what was asked for."""
        cells = [cell for cell in self.cells if _row_of(cell) == row]
        if self.request.sort == BY_RUN:
            score = min((cell.position for cell in cells), default=0)
        else:
            name = self.request.sort
            score = min((-self.better[name] * cell.mean(name) for cell in cells), default=inf)
        return not row[0], not cells, inf if isnan(score) else score

    def _published_key(self, row: PublishedRow) -> Key:
        return row.key(self.request.rows) + (None,) * (len(self.rows) - len(self.request.rows))

    def _key(self, row: Mapping[str, Any], columns: Sequence[str]) -> Key:
        return tuple(plain(row[column]) for column in columns)

    def _place(self, key: Key, columns: Sequence[str], full_precision: bool) -> tuple:
        """Sort key: full precision first among rows that share its settings, then the order asked for, then natural."""
        places = []
        for column, value in zip(columns, key, strict=True):
            order = self.order.get(column, [])
            rank = order.index(value) if value in order else len(order)
            places.append((not (full_precision and is_idle(column)), rank, natural(value)))
        return (*places, not full_precision)

    def _texts(self, rows: Sequence[RowKey], specs: Sequence[str]) -> pd.DataFrame:
        """Write the choices of every row as text, "FP32" once in full precision, and a letter where specs differ."""
        texts = []
        for full_precision, key, spec in rows:
            cells = self._choices(key, full_precision)
            if full_precision:
                idle = [i for i, column in enumerate(self.rows) if is_idle(column)]
                if idle:
                    cells[idle[0]] = REFERENCE
                elif cells:
                    cells[-1] += f" ({REFERENCE})"
            texts.append(cells + ([letter(specs, spec)] if len(specs) > 1 else []))
        heads = [*self.keys, *(["scored"] if len(specs) > 1 else [])]
        return pd.DataFrame(texts, columns=heads, dtype=str)

    def _choices(self, key: Key, full_precision: bool) -> list[str]:
        """Return the choices of a row as texts; those that were added with all their digits, others by their labels."""
        texts = []
        choices = dict(zip(self.keys, key, strict=True))
        for place, (column, (name, value)) in enumerate(zip(self.rows, choices.items(), strict=True)):
            fitting = (one.text for one in self.request.labels if one.key == name and one.fits(choices))
            shown = word(value) if place >= len(self.request.rows) and value is not None else label(
                value, "" if full_precision and is_idle(column) else "—"
            )
            texts.append(next(fitting, shown))
        return texts

    def _block(self, row: Key) -> Key:
        if self.request.best_of_all:
            return ()
        return tuple(value for column, value in zip(self.rows, row, strict=True) if not is_idle(column))

    def _published(self, table: ResultTable, rows: Sequence[RowKey]) -> dict[str, pd.Series]:
        """Return the columns of published figures, to the right of ours; their headings go into `table`."""
        numbers = {}
        for entry in self.request.published:
            figures = {(row.fp32, self._published_key(row)): row.figures for row in entry.rows}
            for name in entry.values():
                place = f"published {entry.heading}/{name}"
                numbers[place] = pd.Series([figures.get(row[:2], {}).get(name) for row in rows], dtype=float)
                table.titles[place], table.groups[place] = VALUES[name].heading, f"published, {entry.heading}"
                table.digits[place] = VALUES[name].digits
        return numbers
