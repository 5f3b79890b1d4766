"""A table by configuration keys: a row and a column per choice, mean ± std over seeds, best in bold, and its notes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from ptq_exp.errors import DataError
from ptq_exp.reports.tables.cells import Key, chosen, fate_of, make_cells
from ptq_exp.reports.tables.identity import plain
from ptq_exp.reports.tables.labels import condition, label, letter, natural
from ptq_exp.reports.tables.pivot import RowKey, arranged, shares
from ptq_exp.reports.tables.published import Published, published_keys
from ptq_exp.reports.tables.settings import BITS, FULL_PRECISION, VALUES, Value, is_idle, key_column, prepared, value_of
from ptq_exp.reports.tables.twins import with_twins

REFERENCE = "FP32"
_ARROWS = {-1: " ↓", 0: "", 1: " ↑"}


@dataclass(frozen=True)
class Request:
    """What a table shows; the names are those of the command line and of `conf/table/`.

    `where` maps keys to allowed values; `best_within` None marks the best among rows that have the same full-precision
    model, sampler and scores, () the best of all that are scored alike.
    """

    rows: Sequence[str]
    cols: Sequence[str] = ()
    values: Sequence[str] = ("fid", "sfid", "is")
    agg: Sequence[str] = ("seed",)
    where: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    delta: bool = False
    fp32: bool = True
    best_within: Sequence[str] | None = None
    published: Sequence[Published] = ()
    title: str = ""


@dataclass(frozen=True)
class ResultTable:
    """A table to print: `frame`, and for its columns headings, headings above these, and digits; then its notes.

    A column v has companions in `frame`: v.std, v.runs (how many), v.n (the same, where it is
    unusual), v.delta, v.best.
    """

    frame: pd.DataFrame
    titles: dict[str, str]
    groups: dict[str, str]
    digits: dict[str, int]
    notes: list[str]
    title: str = ""


def result_table(runs: pd.DataFrame, request: Request, settings: Iterable[str] = ()) -> ResultTable:
    """The table that `request` describes, made of `runs` (see `gather`).

    Runs of different metric specs, the seed aside, never meet in one cell: each spec has rows of its own. The runs of
    the full-precision model are one row for each choice of model, sampler and evaluation, in all columns that share it.

    Args:
        settings: columns (config.…) that are valid even where no run has them.

    Raises:
        ConfigError: an unknown key or value, or runs that differ in another setting would be averaged.
        DataError: there is no experiment among the runs, or none passes the filter.
    """
    return _Builder(runs, request, settings).table()


class _Builder:
    """The steps from runs to a table; what is noticed on the way goes into `notes`."""

    def __init__(self, runs: pd.DataFrame, request: Request, settings: Iterable[str]) -> None:
        columns = {*map(str, runs), *settings, "name"}
        self.request = request
        self.rows = [key_column(key, columns) for key in request.rows]
        self.cols = [key_column(key, columns) for key in request.cols]
        agg = [key_column(key, columns) for key in request.agg]
        where = {key_column(key, columns): list(allowed) for key, allowed in request.where.items()}
        self.values: dict[str, Value] = {name: value_of(name, columns) for name in request.values}
        runs, self.lost = self._experiments(runs, [*self.rows, *self.cols, *agg, *where])
        runs = chosen(runs, where)
        runs = with_twins(runs) if request.fp32 else runs[~runs[FULL_PRECISION]]
        if runs.empty:
            none_left = f"none of the runs passes the filter ({', '.join(map(condition, request.where.items()))})"
            if not request.published:
                raise DataError(none_left)
            self.lost.insert(0, none_left)
        finished = runs["status"] == "finished"
        self.cells, self.notes = make_cells(runs[finished], self.rows, self.cols, self.values, agg)
        self.unfinished = runs[~finished]
        self.order = {column: [plain(v) for v in allowed] for column, allowed in where.items()}
        for column, key in zip(self.rows, request.rows, strict=True):
            self.order.setdefault(column, published_keys(request.published, key))

    def _experiments(self, runs: pd.DataFrame, settings: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
        """The prepared runs that say what they are, and notes about those that do not."""
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
        table = ResultTable(frame, {name: name for name in frame}, {}, {}, [], self.request.title)
        counts = [len(numbers) for cell in self.cells for numbers in cell.numbers.values() if len(numbers)]
        usual = max(set(counts), key=lambda n: (counts.count(n), n)) if counts else 0
        numbers = self._measured(table, rows, columns, usual) | self._published(table, rows)
        table.notes.extend([*self._scored(specs, usual, counts), *self.notes, *fate_of(self.unfinished), *self.lost])
        table.notes.extend(
            f"{entry.heading}: {entry.source}; published, not measured here" for entry in self.request.published
        )
        return replace(table, frame=pd.concat([frame, pd.DataFrame(numbers, index=frame.index)], axis=1))

    def _measured(
        self, table: ResultTable, rows: Sequence[RowKey], columns: Sequence[Key], usual: int
    ) -> dict[str, pd.Series]:
        """Columns of `frame` with what was measured; their headings go into `table`."""
        blocks = {row: self._block(row[1]) for row in rows}
        wide = arranged(self.cells, rows, columns, self.values, (self.rows, self.cols), blocks)
        numbers = {}
        for i, column in enumerate(columns):
            group = ", ".join(label(value, REFERENCE) for value in column)
            for name, value in self.values.items():
                place = f"{group}/{name}" if group else name
                kinds = {kind: wide[kind, i, name] for kind in ("mean", "std", "n", "delta", "best")}
                numbers[place] = kinds["mean"].astype(float)
                numbers[f"{place}.std"] = kinds["std"].astype(float)
                numbers[f"{place}.runs"] = kinds["n"].astype("Int64")
                numbers[f"{place}.n"] = kinds["n"].astype(float).where(kinds["n"] != usual)
                numbers[f"{place}.best"] = kinds["best"].map(lambda best: best is True or best == 1).astype(bool)
                if self.request.delta:
                    numbers[f"{place}.delta"] = kinds["delta"].astype(float)
                table.titles[place], table.groups[place] = value.heading + _ARROWS[value.better], group
                table.digits[place] = value.digits
        return numbers

    def _columns(self) -> list[Key]:
        """The choices of the columns, in order; those of full-precision runs only where no other has them."""
        found = {cell.column for cell in self.cells if not cell.full_precision}
        found |= {self._key(row, self.cols) for row in self.unfinished.to_dict("records") if not row[FULL_PRECISION]}
        for cell in self.cells:
            if cell.full_precision and not any(shares(self.cols, cell.column, c) for c in found):
                found.add(cell.column)
        return sorted(found or ({()} if not self.cols else set()), key=lambda key: self._place(key, self.cols, False))

    def _row_keys(self, specs: Sequence[str]) -> list[RowKey]:
        """(full precision, choices, spec) of the rows, in order; an unfinished or published one has the spec ""."""
        found = {(cell.full_precision, cell.row, cell.spec) for cell in self.cells}
        empty = [(bool(row[FULL_PRECISION]), self._key(row, self.rows)) for row in self.unfinished.to_dict("records")]
        for entry in self.request.published:
            empty += [(row.fp32, row.key(self.request.rows)) for row in entry.rows]
        there = {row[:2] for row in found}
        found |= {(*row, "") for row in empty if row not in there}
        return sorted(found, key=lambda row: (*self._place(row[1], self.rows, row[0]), [*specs, ""].index(row[2])))

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
        """The choices of every row as text, "FP32" once in a full-precision row, and a letter where specs differ."""
        texts = []
        for full_precision, key, spec in rows:
            cells = [label(value, "" if full_precision and is_idle(column) else "—")
                     for column, value in zip(self.rows, key, strict=True)]
            if full_precision:
                idle = [i for i, column in enumerate(self.rows) if is_idle(column)]
                if idle:
                    cells[idle[0]] = REFERENCE
                elif cells:
                    cells[-1] += f" ({REFERENCE})"
            texts.append(cells + ([letter(specs, spec)] if len(specs) > 1 else []))
        heads = [*self.request.rows, *(["scored"] if len(specs) > 1 else [])]
        return pd.DataFrame(texts, columns=heads, dtype=str)

    def _block(self, row: Key) -> Key:
        if self.request.best_within is not None:
            return tuple(row[list(self.request.rows).index(key)] for key in self.request.best_within)
        return tuple(value for column, value in zip(self.rows, row, strict=True) if not is_idle(column))

    def _published(self, table: ResultTable, rows: Sequence[RowKey]) -> dict[str, pd.Series]:
        """The columns of published figures, to the right of ours; their headings go into `table`."""
        numbers = {}
        for entry in self.request.published:
            figures = {(row.fp32, row.key(self.request.rows)): row.figures for row in entry.rows}
            for name in entry.values():
                place = f"published {entry.heading}/{name}"
                numbers[place] = pd.Series([figures.get(row[:2], {}).get(name) for row in rows], dtype=float)
                table.titles[place], table.groups[place] = VALUES[name].heading, f"published, {entry.heading}"
                table.digits[place] = VALUES[name].digits
        return numbers

    def _scored(self, specs: Sequence[str], usual: int, counts: Sequence[int]) -> list[str]:
        """A sentence for each metric spec, and over which runs the numbers were averaged."""
        over = " and ".join(self.request.agg)
        notes = []
        for spec in specs:
            text = ", ".join(f"{key} {value}" for key, value in json.loads(spec).items()) or "no metric spec"
            members = dict.fromkeys(m for cell in self.cells if cell.spec == spec for m in cell.members)
            members = sorted(members, key=lambda member: [*map(natural, member)])
            told = ", ".join("/".join(map(label, member)) for member in members)
            notes.append(f"{letter(specs, spec) + ' ' if len(specs) > 1 else ''}{text}; {over} {told}")
        if counts and max(counts) > 1:
            differs = ", n where it is another number" if len(set(counts)) > 1 else ""
            notes.append(f"mean ± std of n={usual} runs{differs}")
        if len(specs) > 1:
            notes.append("what was scored differently is neither averaged nor compared: see the column scored")
        if self.request.delta:
            notes.append(f"in brackets: difference to {REFERENCE} over the runs of the same {over}")
        return notes
