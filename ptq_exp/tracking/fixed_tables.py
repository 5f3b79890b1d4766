"""Two tables that are more than rows and columns of settings: all experiments, and the ablation of noise correction."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import pandas as pd

from ptq_exp.errors import DataError
from ptq_exp.tracking import ablation
from ptq_exp.tracking.notation import to_latex, to_markdown
from ptq_exp.tracking.runs import add_percent, gather
from ptq_exp.tracking.tables import aggregate, caption

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
Runs = str | os.PathLike | pd.DataFrame


def experiment_table(runs: Runs, form: str = "markdown") -> str:
    """One row per experiment and metric, mean ± std over seeds, and the caption.

    The FP32 row stands first, then the rows in the order of their FID increase, then those without a finished run.

    Args:
        runs: a folder, or what `gather` made of some.
        form: one of `FORMATS`.

    Raises:
        PTQError: there are no results, or runs that differ in a setting would be averaged.
    """
    runs = add_percent(collected(runs), _SHARES)
    if "config.bits.name" not in runs:
        folders = ", ".join(runs["run"])
        raise DataError(f"no results.json below {folders} can be read: run the experiments again")
    runs.loc[runs["config.bits.name"] == "fp32", "config.metric.name"] = "-"
    values = [column for column in TITLES if column not in ("name", "config.metric.name")]
    table = aggregate(runs, ["name", "config.metric.name"], values)
    table = table.sort_values("metrics.fid_increase_units", na_position="first", kind="stable")
    table = table.sort_values("seeds", key=lambda seeds: seeds == "", kind="stable")
    # coverage and BOPs do not depend on the seed
    table = table.drop(columns=[f"{column}.std" for column in values if column.startswith("quantization.")])
    return _printed(table, TITLES, form, "tab:experiments")


def ablation_table(runs: Runs, form: str = "markdown") -> str:
    """The table of `ptq_exp.tracking.ablation` and its caption.

    Args:
        runs: a folder, or what `gather` made of some.
        form: one of `FORMATS`.

    Raises:
        PTQError: there are no results, or runs that differ in a setting would be averaged.
    """
    table = ablation.ablation(collected(runs))
    if form != "csv":
        table[ablation.ETA] = table[ablation.ETA].map("{:g}".format, na_action="ignore")
    return _printed(table, ablation.TITLES, form, "tab:ablation", ablation.BLOCK)


FIXED = {"experiments": experiment_table, "ablation": ablation_table}
"""Layouts that are more than rows and columns of settings."""


def collected(runs: Runs) -> pd.DataFrame:
    """`runs` if they are collected already, else those in the folder of that name."""
    return runs if isinstance(runs, pd.DataFrame) else gather([runs], "results")


def _printed(table: pd.DataFrame, titles: Mapping[str, str], form: str, label: str, blocks: Sequence[str] = ()) -> str:
    if form == "csv":
        return table.to_csv(index=False)
    if form == "latex":
        return to_latex(table, titles, digits=2, caption=caption(table), label=label, blocks=blocks)
    return f"{to_markdown(table, titles, digits=2)}\n{caption(table)}"
