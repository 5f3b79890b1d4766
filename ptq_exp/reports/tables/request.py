"""What a table shows, and the table itself before it is written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import pandas as pd

from ptq_exp.reports.tables.labels import label
from ptq_exp.reports.tables.published import Published

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
class Request:
    """What a table shows; the names are those of the command line and of `conf/table/`.

    Attributes:
        where: key -> values that are let through.
        best_within: None marks the best among rows that have the same full-precision model, sampler and scores, () the
            best of all that are scored alike.
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
    best_within: Sequence[str] | None = None
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
