"""A data frame as a Markdown or a LaTeX table, with mean, deviation, count and difference in one cell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pandas as pd

from ptq_exp.errors import ConfigError
from ptq_exp.results.missing import is_missing

COMPANIONS = (".std", ".n", ".runs", ".delta", ".best", ".low", ".high")
"""Endings of columns that belong to another one."""


@dataclass(frozen=True)
class _Notation:
    """How a kind of table writes its cells."""

    missing: str
    plus_minus: str
    infinity: tuple[str, str]  # positive, negative
    number: str  # what a number is put into
    bold: str
    count: str
    text: Callable[[str], str]


_MARKDOWN = _Notation(
    "—", " ± ", ("∞", "−∞"), "{}", "**{}**", " (n={})", lambda text: text.replace("|", "\\|")
)
_LATEX_SPECIAL = {character: f"\\{character}" for character in "%_&#${}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "±": r"$\pm$", "—": "--", "−": "$-$", "↓": r"$\downarrow$",
    "↑": r"$\uparrow$", "η": r"$\eta$",
}
_LATEX = _Notation(
    "--", r" \pm ", (r"\infty", r"-\infty"), "${}$", r"\mathbf{{{}}}", r"\,(n{{=}}{})",
    lambda text: text.translate(str.maketrans(_LATEX_SPECIAL)),
)


def to_markdown(
    table: pd.DataFrame,
    titles: Mapping[str, str] | None = None,
    digits: int | Mapping[str, int] = 3,
    *,
    groups: Mapping[str, str] | None = None,
) -> str:
    """Write a frame as a Markdown table.

    A column v with a companion f"{v}.std" is printed as mean ± std; a missing cell as a dash, infinity as ∞. Where
    there are f"{v}.best" (bool), f"{v}.n" (a count to show) and f"{v}.delta" (a difference), the cell is bold, and
    count and difference follow it in brackets; an interval f"{v}.low", f"{v}.high" in square ones.

    Args:
        table: the frame of a `ResultTable`, or any other.
        titles: {column: heading}, which also chooses the columns and their order; None prints all of them.
        digits: after the decimal point, for all columns or for each.
        groups: {column: heading above it}, written before the column's own.

    Raises:
        ConfigError: a title for a column that is not there.
    """
    titles, groups = _chosen(table, titles), groups or {}
    heads = [f"{groups[column]}: {title}" if groups.get(column) else title for column, title in titles.items()]
    sides = ["left" if _is_text(table[column]) else "right" for column in titles]
    cells = _written(table, titles, digits, _MARKDOWN)
    return cells.to_markdown(
        index=False, headers=[_MARKDOWN.text(head) for head in heads], colalign=sides, disable_numparse=True
    ) + "\n"


def to_latex(
    table: pd.DataFrame,
    titles: Mapping[str, str] | None = None,
    digits: int | Mapping[str, int] = 3,
    *,
    groups: Mapping[str, str] | None = None,
    caption: str | None = None,
    label: str | None = None,
    blocks: Sequence[str] = (),
) -> str:
    r"""Write the table of `to_markdown` in LaTeX, with the rules of the package booktabs.

    Numbers stand in math mode, mean and deviation as `$1.23 \pm 0.04$`, a missing cell as `--`. Texts, headings and
    the caption are escaped.

    Args:
        table, titles, digits: as in `to_markdown`.
        groups: {column: heading above it}; neighbours with the same one share it.
        caption: plain text. With a caption or a label the tabular stands in a floating `table`.
        label: for `\ref`, as it is.
        blocks: columns of `table`; a `\midrule` separates two rows that differ in one of them.

    Raises:
        ConfigError: a title or a block for a column that is not there.
    """
    titles = _chosen(table, titles)
    above = [(groups or {}).get(column, "") for column in titles]
    _chosen(table, {column: column for column in blocks})
    cells = _written(table, titles, digits, _LATEX)
    heads = [_LATEX.text(title) for title in titles.values()]
    floating = caption is not None or label is not None
    if any(above):
        cells.columns = pd.MultiIndex.from_arrays([[_LATEX.text(group) for group in above], heads])
    else:
        cells.columns = heads
    text = cells.style.hide(axis="index").to_latex(
        hrules=True, column_format="".join("l" if _is_text(table[column]) else "r" for column in titles),
        multicol_align="c", caption=None if caption is None else _LATEX.text(caption), label=label,
        position_float="centering" if floating else None,
    )
    lines = text.splitlines()
    first = lines.index(r"\midrule") + 1
    changes = table[list(blocks)].astype(str).ne(table[list(blocks)].astype(str).shift()).any(axis=1)
    for row in reversed([place for place, changed in enumerate(changes) if changed and place]):
        lines.insert(first + row, r"\midrule")
    if any(above):
        lines.insert(lines.index(r"\toprule") + 2, _rules_below(above))
    return "\n".join(lines) + "\n"


def _rules_below(groups: Sequence[str]) -> str:
    """Return the rules below headings that stand over several columns."""
    rules, place = [], 1
    for group, members in groupby(groups):
        width = len(list(members))
        rules += [rf"\cmidrule(lr){{{place}-{place + width - 1}}}"] if group else []
        place += width
    return " ".join(rules)


def _chosen(table: pd.DataFrame, titles: Mapping[str, str] | None) -> dict[str, str]:
    """Return the columns to print and their headings: `titles`, or all columns but the companions."""
    companions = {f"{column}{ending}" for column in table for ending in COMPANIONS}
    titles = titles or {column: column for column in table if column not in companions}
    if unknown := [column for column in titles if column not in table]:
        raise ConfigError(f"no column {unknown[0]!r} in the table, expected one of: {', '.join(table)}")
    return dict(titles)


def _is_text(column: pd.Series) -> bool:
    return not pd.api.types.is_numeric_dtype(column)


def _written(
    table: pd.DataFrame, columns: Iterable[str], digits: int | Mapping[str, int], notation: _Notation
) -> pd.DataFrame:
    """Return the cells of `columns` as texts, mean, deviation and what else belongs to one number in one of them."""
    places = digits if isinstance(digits, Mapping) else dict.fromkeys(columns, digits)
    rows = [[_cell(row, column, places.get(column, 3), notation) for column in columns]
            for row in table.to_dict("records")]
    return pd.DataFrame(rows, columns=list(columns), dtype=object)


def _cell(row: Mapping[str, Any], column: str, digits: int, notation: _Notation) -> str:
    value, deviation = row[column], row.get(f"{column}.std")
    if is_missing(value):
        return notation.missing
    if isinstance(value, bool) or not isinstance(value, int | float):
        return notation.text(str(value))
    parts = [value] if is_missing(deviation) else [value, deviation]
    text = notation.plus_minus.join(_number(part, digits, notation) for part in parts)
    if row.get(f"{column}.best") is True:
        text = notation.bold.format(text)
    if not is_missing(low := row.get(f"{column}.low")):
        text += f" [{_number(low, digits, notation)}, {_number(row[f'{column}.high'], digits, notation)}]"
    if not is_missing(count := row.get(f"{column}.n")):
        text += notation.count.format(int(count))
    if not is_missing(delta := row.get(f"{column}.delta")):
        text += f" ({'+' if delta >= 0 else ''}{_number(float(delta), digits, notation)})"
    return notation.number.format(text)


def _number(value: float, digits: int, notation: _Notation) -> str:
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return notation.infinity[value < 0]
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)
