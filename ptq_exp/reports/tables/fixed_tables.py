"""Two tables that are more than rows and columns of settings: all experiments, and the ablation of noise correction."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence

import pandas as pd

from ptq_exp.errors import DataError
from ptq_exp.reports.tables import ablation
from ptq_exp.reports.tables.cells import fate_of
from ptq_exp.reports.tables.identity import SPEC
from ptq_exp.reports.tables.labels import letter, word
from ptq_exp.reports.tables.notation import to_latex, to_markdown
from ptq_exp.reports.tables.runs import add_percent, gather
from ptq_exp.reports.tables.settings import BITS, with_effect
from ptq_exp.reports.tables.tables import APART, NOTES, aggregate_apart, caption, scored_differently

TITLES = {
    "name": "experiment",
    "config.metric.name": "metric",
    "metrics.fid": "FID",
    "metrics.sfid": "sFID",
    "metrics.is": "IS",
    "metrics.fid_increase_units": "FID increase",
    "metrics.psnr": "PSNR dB",
    "metrics.eps_error_percent": "eps error %",
    "quantization.coverage_percent": "coverage %",
    "quantization.bops_ratio": "BOPs ratio",
}
"""Column of the results -> heading."""
_SHARES = {
    "metrics.eps_error_percent": "metrics.eps_error",
    "quantization.coverage_percent": "quantization.coverage_conv_linear",
}
_log = logging.getLogger(__name__)
Runs = str | os.PathLike | pd.DataFrame


def experiment_table(runs: Runs, form: str = "markdown") -> str:
    """One row per experiment and metric, mean ± std over seeds, the caption, and what the table leaves out.

    Runs of one name that differ in other settings have rows of their own, with these settings as columns. The FP32 row
    stands first, then the rows in the order of their FID increase, then those without a finished run.

    Args:
        runs: a folder, or what `gather` made of some.
        form: one of `FORMATS`.

    Raises:
        PTQError: there are no results.
    """
    runs = add_percent(collected(runs), _SHARES)
    if BITS not in runs:
        folders = ", ".join(runs["run"])
        raise DataError(f"no results.json below {folders} can be read: run the experiments again")
    runs, notes = _experiments(with_effect(runs))
    runs.loc[runs[BITS] == "fp32", "config.metric.name"] = "-"
    values = [column for column in TITLES if column not in ("name", "config.metric.name")]
    table = aggregate_apart(runs, ["name", "config.metric.name"], values)
    table = table.sort_values("metrics.fid_increase_units", na_position="first", kind="stable")
    table = table.sort_values("seeds", key=lambda seeds: seeds == "", kind="stable")
    # coverage and BOPs do not depend on the seed
    table = table.drop(columns=[f"{column}.std" for column in values if column.startswith("quantization.")])
    return _printed(table, TITLES, form, "tab:experiments", notes)


def _experiments(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The runs without those that are finished but no experiments, and notes about these and the unfinished ones."""
    if BITS not in runs:
        return runs, fate_of(runs)
    foreign = runs[BITS].isna() & (runs["status"] == "finished")
    notes = [f"no experiments, left out: {', '.join(runs.loc[foreign, 'run'])}"] if foreign.any() else []
    return runs[~foreign].copy(), [*fate_of(runs), *notes]


def ablation_table(runs: Runs, form: str = "markdown") -> str:
    """The table of `ptq_exp.reports.tables.ablation`, its caption, and what it leaves out.

    Args:
        runs: a folder, or what `gather` made of some.
        form: one of `FORMATS`.

    Raises:
        PTQError: there are no results.
    """
    runs, notes = _experiments(collected(runs))
    table = ablation.ablation(runs)
    if form != "csv":
        table[ablation.ETA] = table[ablation.ETA].map("{:g}".format, na_action="ignore")
    return _printed(table, ablation.TITLES, form, "tab:ablation", notes, ablation.BLOCK)


FIXED = {"experiments": experiment_table, "ablation": ablation_table}
"""Layouts that are more than rows and columns of settings."""


def collected(runs: Runs) -> pd.DataFrame:
    """`runs` if they are collected already, else those in the folder of that name."""
    return runs if isinstance(runs, pd.DataFrame) else gather([runs], "results")


def _printed(
    table: pd.DataFrame, titles: Mapping[str, str], form: str, label: str, notes: Sequence[str],
    blocks: Sequence[str] = (),
) -> str:  # fmt: skip
    """The table with its caption and notes; CSV has no place for notes, they are logged."""
    apart, notes = table.attrs[APART], [*table.attrs[NOTES], *notes]
    if form == "csv":
        for note in notes:
            _log.warning("%s", note)
        return table.to_csv(index=False)
    specs = scored_differently(table)
    table = table.assign(**{column: table[column].map(word) for column in apart})
    table = table.assign(scored=[letter(specs, spec) for spec in table[SPEC]])
    keys = {column: title for column, title in titles.items() if not column.startswith(("metrics.", "quantization."))}
    keys = {column: title for column, title in keys.items() if column != "seeds"}
    added = {column: column.removeprefix("config.").removesuffix(".name") for column in apart}
    titles = keys | added | ({"scored": "scored"} if specs else {}) | titles
    if form == "latex":
        text = " ".join([caption(table), *(f"{note}." for note in notes)])
        blocks = [*blocks, *apart] if blocks else []
        return to_latex(table, titles, digits=2, caption=text, label=label, blocks=blocks)
    notes = "".join(f"\n- {note}" for note in notes)
    return f"{to_markdown(table, titles, digits=2)}\n{caption(table)}{notes}"
