"""Tables over many runs, made from their results.json: collect, average over seeds, print as Markdown or LaTeX."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ptq_exp.errors import ConfigError, DataError
from ptq_exp.tracking.results import read_json

_log = logging.getLogger(__name__)

# Settings that may differ between the runs of one average: they change where and how a run is
# executed and recorded, not its numbers.
EXECUTION_SETTINGS = ("seed", "cache", "cache_dir", "logger", "trainer", "imports")
# What runs did that are older than a setting.
_BEFORE = {"config.calibration.labels": "paired"}


def collect(runs_dir: str | os.PathLike) -> pd.DataFrame:
    """One row per results.json below `runs_dir`, nested keys joined by dots ("metrics.fid", "config.seed").

    Two columns are added: "run", the folder relative to runs_dir, and "modified", the file's time in seconds.
    A file that cannot be read is logged and gives a row with status "unreadable". A key that a run lacks is
    missing (NaN) in its row; lists stay lists.

    Raises:
        DataError: `runs_dir` holds no results.json.
    """
    runs_dir = Path(runs_dir)
    rows = [_row(path, runs_dir) for path in sorted(runs_dir.rglob("results.json"))]
    if not rows:
        raise DataError(f"no results.json below {runs_dir}: run an experiment first or name another folder")
    return pd.DataFrame(rows)


def _row(path: Path, runs_dir: Path) -> dict[str, Any]:
    row = {"run": path.parent.relative_to(runs_dir).as_posix(), "modified": path.stat().st_mtime}
    try:
        values = read_json(path)
        if not isinstance(values, dict):
            raise DataError(f"{path} holds a {type(values).__name__}, expected an object")
    except DataError as error:
        _log.warning("%s", error)
        return row | {"status": "unreadable"}
    flat = flatten(values)
    return row | (_BEFORE if "config.calibration.name" in flat else {}) | flat


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; an empty mapping disappears."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def add_percent(runs: pd.DataFrame, shares: Mapping[str, str]) -> pd.DataFrame:
    """`runs` with new columns: {new: share} gives 100 times the column `share`, missing where there is none."""
    nothing = pd.Series(float("nan"), index=runs.index)
    return runs.assign(**{new: 100 * runs.get(share, nothing) for new, share in shares.items()})


def aggregate(
    runs: pd.DataFrame,
    by: Sequence[str],
    values: Sequence[str],
    over: str = "seed",
    *,
    ignore: Sequence[str] = EXECUTION_SETTINGS,
) -> pd.DataFrame:
    """Mean and standard deviation of `values` over the finished runs of each group.

    Runs are grouped by `by` and by their metric_spec without its seed: numbers of different extractors,
    sample counts or references never meet in one average. Of several runs with the same group and seed the
    newest counts, so that a repeated run does not weigh twice.

    Args:
        runs: from `collect`.
        by: columns that name a table row, such as ["name"]; a missing value is a group of its own.
        values: columns to average, such as ["metrics.fid"].
        over: the column that tells the runs of one group apart.
        ignore: names below "config." that may differ within a group; any other difference is an error.

    Returns:
        In order of first appearance, the columns of `by`, then "metric_spec" (JSON), "seeds" ("0, 1, 2"), and
        for each value v the columns v (mean) and f"{v}.std" (ddof=1; missing for a single run). Groups
        without a finished run have no seeds and missing values.

    Raises:
        ConfigError: an unknown column, or runs of one group that differ in a setting.
    """
    unknown = [column for column in [*by, over] if column not in runs]
    if unknown:
        near = ", ".join(sorted(str(column) for column in runs))
        raise ConfigError(f"no column {unknown[0]!r} in the results, expected one of: {near}")
    runs = runs.assign(**{_SPEC: [_spec(row) for row in runs.to_dict("records")]})
    rows = []
    for _, group in runs.groupby([*by, _SPEC], dropna=False, sort=False):
        finished = group[group["status"] == "finished"].sort_values("modified")
        finished = finished.drop_duplicates(over, keep="last").sort_values(over)
        _same_settings(finished, by, ignore)
        row = {column: group[column].iloc[0] for column in [*by, _SPEC]}
        row["seeds"] = ", ".join(_plain_number(seed) for seed in finished[over])
        for value in values:
            numbers = pd.to_numeric(finished[value]) if value in finished else pd.Series(dtype=float)
            row[value], row[f"{value}.std"] = numbers.mean(), numbers.std()
        rows.append(row)
    return pd.DataFrame(rows)


_SPEC = "metric_spec"


def _spec(row: Mapping[str, Any]) -> str:
    """Canonical JSON of a run's metric_spec without its seed."""
    prefix = f"{_SPEC}."
    spec = {key.removeprefix(prefix): value for key, value in row.items() if str(key).startswith(prefix)}
    spec = {key: _exact(value) for key, value in spec.items() if key != "seed" and not _is_missing(value)}
    return json.dumps(spec, sort_keys=True)


def _exact(value: Any) -> Any:
    """2048.0 -> 2048: a column in which some run lacks the value has become float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def _plain_number(value: Any) -> str:
    return str(_exact(value))


def _same_settings(group: pd.DataFrame, by: Sequence[str], ignore: Sequence[str]) -> None:
    """Refuse to average runs whose configuration differs in more than seed and execution."""
    for column in group:
        parts = str(column).split(".")
        if parts[0] != "config" or column in by or any(part in ignore for part in parts[1:]):
            continue
        found = {json.dumps(_exact(value), default=str) for value in group[column] if not _is_missing(value)}
        if len(found) > 1 or (found and group[column].map(_is_missing).any()):
            runs = ", ".join(group["run"])
            raise ConfigError(
                f"the runs {runs} would be averaged but differ in {column} ({', '.join(sorted(found))}): "
                f"add {column!r} to `by`, or its name to `ignore`, or read only the runs of a folder that agree"
            )


@dataclass(frozen=True)
class _Notation:
    """How a kind of table writes its cells."""

    missing: str
    plus_minus: str
    infinity: tuple[str, str]  # positive, negative
    number: str  # what a number is put into
    text: Callable[[str], str]


_MARKDOWN = _Notation("—", " ± ", ("∞", "−∞"), "{}", lambda text: text.replace("|", "\\|"))
_LATEX_SPECIAL = {character: f"\\{character}" for character in "%_&#${}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "±": r"$\pm$",
}  # fmt: skip
_LATEX = _Notation(
    "--", r" \pm ", (r"\infty", r"-\infty"), "${}$", lambda text: text.translate(str.maketrans(_LATEX_SPECIAL))
)


def to_markdown(table: pd.DataFrame, titles: Mapping[str, str] | None = None, digits: int = 3) -> str:
    """A Markdown table of an aggregated (or any other) frame.

    A column v with a companion f"{v}.std" is printed as mean ± std; a missing cell as a dash, infinity as ∞.

    Args:
        table: from `aggregate`.
        titles: {column: heading}, which also chooses the columns and their order; None prints all of them.
        digits: after the decimal point.

    Raises:
        ConfigError: a title for a column that is not there.
    """
    titles = _chosen(table, titles)
    heads = [_MARKDOWN.text(title) for title in titles.values()]
    lines = [heads, ["---" if _is_text(table[column]) else "---:" for column in titles]]
    lines += [_cells(row, titles, digits, _MARKDOWN) for row in table.to_dict("records")]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def to_latex(
    table: pd.DataFrame,
    titles: Mapping[str, str] | None = None,
    digits: int = 3,
    *,
    caption: str | None = None,
    label: str | None = None,
    blocks: Sequence[str] = (),
) -> str:
    r"""The table of `to_markdown` in LaTeX, with the rules of the package booktabs.

    Numbers stand in math mode, mean and deviation as `$1.23 \pm 0.04$`, a missing cell as `--`. Texts, headings and
    the caption are escaped.

    Args:
        table, titles, digits: as in `to_markdown`.
        caption: plain text. With a caption or a label the tabular stands in a floating `table`.
        label: for `\ref`, as it is.
        blocks: columns of `table`; a `\midrule` separates two rows that differ in one of them.

    Raises:
        ConfigError: a title or a block for a column that is not there.
    """
    titles = _chosen(table, titles)
    _chosen(table, {column: column for column in blocks})
    columns = "".join("l" if _is_text(table[column]) else "r" for column in titles)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    lines.append(_latex_row(_LATEX.text(title) for title in titles.values()))
    block = None
    for row in table.to_dict("records"):
        if block != (block := [str(row[column]) for column in blocks]):
            lines.append(r"\midrule")
        lines.append(_latex_row(_cells(row, titles, digits, _LATEX)))
    lines += [r"\bottomrule", r"\end{tabular}"]
    if caption is not None or label is not None:
        head = [r"\begin{table}", r"\centering"]
        head += [] if caption is None else [rf"\caption{{{_LATEX.text(caption)}}}"]
        head += [] if label is None else [rf"\label{{{label}}}"]
        lines = [*head, *lines, r"\end{table}"]
    return "\n".join(lines) + "\n"


def _latex_row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _chosen(table: pd.DataFrame, titles: Mapping[str, str] | None) -> dict[str, str]:
    """The columns to print and their headings: `titles`, or all columns but the deviations."""
    deviations = {f"{column}.std" for column in table}
    titles = titles or {column: column for column in table if column not in deviations}
    if unknown := [column for column in titles if column not in table]:
        raise ConfigError(f"no column {unknown[0]!r} in the table, expected one of: {', '.join(table)}")
    return dict(titles)


def _is_text(column: pd.Series) -> bool:
    return not pd.api.types.is_numeric_dtype(column)


def _cells(row: Mapping[str, Any], columns: Iterable[str], digits: int, notation: _Notation) -> list[str]:
    return [_cell(row, column, digits, notation) for column in columns]


def _cell(row: Mapping[str, Any], column: str, digits: int, notation: _Notation) -> str:
    value, deviation = row[column], row.get(f"{column}.std")
    if _is_missing(value) or value is pd.NA:
        return notation.missing
    if isinstance(value, bool) or not isinstance(value, int | float):
        return notation.text(str(value))
    parts = [value] if _is_missing(deviation) else [value, deviation]
    return notation.number.format(notation.plus_minus.join(_number(part, digits, notation) for part in parts))


def _number(value: float, digits: int, notation: _Notation) -> str:
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return notation.infinity[value < 0]
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def caption(table: pd.DataFrame) -> str:
    """What identifies the numbers of an aggregated table: every metric_spec in it, and the seeds.

    One sentence per metric_spec, in order of appearance.
    """
    sentences = []
    for text, rows in table.groupby(_SPEC, sort=False):
        spec = ", ".join(f"{key} {value}" for key, value in json.loads(text).items()) or "no metric spec"
        seeds = "; ".join(dict.fromkeys(seeds for seeds in rows["seeds"] if seeds)) or "none finished"
        sentences.append(f"{spec}; seeds {seeds}.")
    return "\n".join(sentences)
