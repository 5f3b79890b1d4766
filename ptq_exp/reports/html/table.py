"""Tables of a report: cells that are shown one way and sorted another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ptq_exp.results.missing import is_missing

MISSING = "—"


@dataclass(frozen=True)
class Cell:
    """What is shown, what it is sorted by ("" = last), an address it leads to, and a bar of 0 to 100 % behind it."""

    text: str
    key: float | str = ""
    link: str | None = None
    bar: float | None = None


@dataclass(frozen=True)
class Table:
    """Columns (title, whether it holds numbers), rows of as many cells, and what is said about them.

    A column without a title cannot be sorted by. `order`: the column that rows come sorted by, and "ascending" or
    "descending".
    """

    columns: Sequence[tuple[str, bool]]
    rows: list[list[Cell]]
    label: str
    sortable: bool = True
    note: str = ""
    head: bool = True
    order: tuple[int, str] | None = None


def listing(rows: list[list[Cell]], label: str) -> Table:
    """Return a table of names and their values, without a head."""
    return Table([("", False), ("", False)], rows, label, sortable=False, head=False)


def number(value: Any, form: str = "{:.4g}", deviation: Any = None, interval: Sequence[float] | None = None) -> Cell:
    """Return a number, with its standard deviation or interval if there is one; a dash where it is missing or NaN."""
    if is_missing(value):
        return Cell(MISSING)
    value = float(value)
    if math.isinf(value):
        return Cell(*("∞", "Infinity") if value > 0 else ("−∞", "-Infinity"))
    spread = "" if is_missing(deviation) else f" ± {form.format(float(deviation))}"
    if interval is not None and not is_missing(interval[0]):
        spread += f" [{', '.join(form.format(bound) for bound in interval)}]".replace("-", "−")
    return Cell(form.format(value).replace("-", "−") + spread, value)


def text(value: Any) -> Cell:
    """Return a word, a list of widths as 4/8; a dash where it is missing."""
    if is_missing(value):
        return Cell(MISSING)
    shown = "/".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return Cell(shown, shown)
