"""The Pareto plot of a sweep: what quantization costs in quality over the bit operations that are left."""

from __future__ import annotations

from functools import partial

import pandas as pd

from ptq_exp.reports.html.section import Section, drawn
from ptq_exp.reports.pareto import front_figure
from ptq_exp.reports.tables.columns import OF_REFERENCE, VALUES
from ptq_exp.reports.tables.request import ResultTable

COST = "bops_g"
LOSSES = {"fid_increase_units": "FID increase over FP32", "eps_error_percent": "relative eps error, %"}
"""What is drawn over bit operations; less is better."""


def pareto_section(table: ResultTable, runs: pd.DataFrame) -> Section | None:
    """Draw a plot for each model and loss that was measured at two or more points; None where there is none.

    Args:
        table: means over seeds.
        runs: all runs, for the bit operations of full precision.
    """
    quantized = table.frame[[not full_precision for full_precision, _ in table.rows]]
    quantized = quantized.assign(called=[_called(row, table.keys) for row in quantized.to_dict("records")])
    pictures = []
    for model, rows in quantized.groupby("model", sort=False) if "model" in quantized else ():
        rows = rows.reset_index(drop=True)  # the number of a row chooses its colour and marker in all plots
        for column, title in LOSSES.items():
            points = rows.dropna(subset=[COST, column])
            if len(points) < 2:
                continue
            pictures.append(drawn(
                partial(front_figure, points, COST, column, names=("BOPs of an evaluation, G (conv + linear)",
                        f"{title} ({model})"), full_precision=_full_precision(runs, model)),
                f"{title} over bit operations, {model}",
                f"{title}, {model}: mean over seeds, bars are ± one standard deviation. The line joins what nothing "
                "else beats in both; the star is full precision.",
            ))
    return Section("pareto", "Quality over bit operations", pictures=pictures) if pictures else None


def _called(row: dict, keys: list[str]) -> str:
    """Return the experiment, and what else tells it apart."""
    return ", ".join([str(row["name"]), *(f"{key}={row[key]}" for key in keys if key not in ("name", "model"))])


def _full_precision(runs: pd.DataFrame, model: str) -> float | None:
    """Bit operations of the full-precision model in billions, as any of its quantized runs counted them."""
    column = OF_REFERENCE[VALUES[COST].column]
    if column not in runs:
        return None
    found = runs.loc[runs["config.model.name"] == model, column].dropna()
    return float(found.iloc[0]) * VALUES[COST].factor if len(found) else None
