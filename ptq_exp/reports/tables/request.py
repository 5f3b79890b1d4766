"""What a table shows, figures that others have published beside ours, and the table before it is written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import pandas as pd

from ptq_exp.reports.tables.columns import IDLE_GROUPS
from ptq_exp.reports.tables.labels import label

REFERENCE = "FP32"
"""What a row of the full-precision model is called."""
BY_RUN = "run"
"""A `sort` of its own: rows in the order of their first runs."""


@dataclass(frozen=True)
class RowLabel:
    """What stands in a row in place of the value of `key`, where each key of `where` has a value that fits its glob."""

    key: str
    where: Mapping[str, str]
    text: str

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether it is said of a row with these values by key."""
        return all(key in row and fnmatchcase(label(row[key]), glob) for key, glob in self.where.items())


@dataclass(frozen=True)
class PublishedRow:
    """The figures of one row: its settings by key, whether it is the full-precision model, and {value name: number}."""

    settings: Mapping[str, Any]
    fp32: bool
    figures: Mapping[str, float]

    def key(self, rows: Sequence[str]) -> tuple[Any, ...]:
        """Its choices for the keys `rows`; what has no effect in full precision is missing there."""
        return tuple(None if self.fp32 and idle_key(key) else self.settings[key] for key in rows)


@dataclass(frozen=True)
class Published:
    """The figures of one source: a short heading, where exactly they stand, and its rows."""

    heading: str
    source: str
    rows: Sequence[PublishedRow]

    def values(self) -> list[str]:
        """Return the values that there are figures of, in order of appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row.figures))


def published_keys(published: Sequence[Published], key: str) -> list[Any]:
    """Return the choices of `key` in order of appearance; none where they are numbers, which stand by size."""
    rows = [row for entry in published for row in entry.rows]
    choices = list(dict.fromkeys(row.settings[key] for row in rows if key in row.settings))
    return choices if all(isinstance(choice, str) for choice in choices) else []


def idle_key(key: str) -> bool:
    """Whether the configuration key has no effect on the full-precision model."""
    return key == "name" or key.split(".", maxsplit=1)[0] in IDLE_GROUPS


@dataclass(frozen=True)
class Request:
    """What a table shows; the names are those of the command line and of `conf/table/`.

    Attributes:
        where: key -> values that are let through.
        best_of_all: mark the best of all rows that are scored alike, not of those alone that have the same
            full-precision model and sampler, too.
        apart: give runs that differ in other settings rows of their own, with these settings as columns, instead of
            refusing to average them.
        sort: a value by which rows are sorted, best first after full precision; `BY_RUN`; "" = by their choices.
        labels: the first that fits a row stands for the choice of its key; choices stand in the order of the labels.
        blocks: keys; a LaTeX table has a rule between two rows that differ in one of them.
    """

    rows: Sequence[str]
    cols: Sequence[str] = ()
    values: Sequence[str] = ("fid", "sfid", "is")
    agg: Sequence[str] = ("seed",)
    where: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    delta: bool = False
    fp32: bool = True
    best_of_all: bool = False
    published: Sequence[Published] = ()
    title: str = ""
    apart: bool = False
    sort: str = ""
    labels: Sequence[RowLabel] = ()
    blocks: Sequence[str] = ()


@dataclass(frozen=True)
class ResultTable:
    """A table to print: `frame`, and for its columns headings, headings above these, and digits; then its notes.

    A column v has companions in `frame`: v.std, v.runs (how many), v.n (the same, where it is
    unusual), v.delta, v.best, and v.low and v.high (95 % interval of a single run) where there is one.

    Attributes:
        blocks: columns; a LaTeX table has a rule between two rows that differ in one of them.
        rows: for each row whether it is of the full-precision model, and what was averaged ("0, 1": seeds).
    """

    frame: pd.DataFrame
    titles: dict[str, str]
    groups: dict[str, str]
    digits: dict[str, int]
    notes: list[str]
    title: str = ""
    blocks: Sequence[str] = ()
    rows: Sequence[tuple[bool, str]] = ()

    @property
    def keys(self) -> list[str]:
        """The columns of `frame` that hold choices."""
        return [column for column in self.frame if column in self.titles and column not in self.digits]
