"""The Pareto plot of a sweep: what quantization costs in quality over the bit operations that are left."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ptq_exp.reports.html.figures import GREY, drawn
from ptq_exp.reports.html.section import Section
from ptq_exp.reports.pareto import front
from ptq_exp.reports.tables.request import ResultTable
from ptq_exp.reports.tables.settings import ACCOUNT, VALUES

COST = "bops_g"
LOSSES = {"fid_increase_units": "FID increase over FP32", "eps_error_percent": "relative eps error, %"}
"""What is drawn over bit operations; less is better."""
# told apart also by those who see red and green alike (Okabe and Ito)
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "osD^vPX"
_NAMED = 28  # more entries than this fill a legend that nobody reads


def pareto_section(table: ResultTable, runs: pd.DataFrame) -> Section | None:
    """A plot for each model and loss that was measured at two or more points; None where there is none.

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
            full = _full_precision(runs, model)
            pictures.append(drawn(
                lambda width, points=points, column=column, title=title, full=full, model=model:
                    _figure(points, column, f"{title} ({model})", full, width),
                f"{title} over bit operations, {model}",
                f"{title}, {model}: mean over seeds, bars are ± one standard deviation. The line joins what nothing "
                "else beats in both; the star is full precision.",
            ))  # fmt: skip
    return Section("pareto", "Quality over bit operations", pictures=pictures) if pictures else None


def _figure(points: pd.DataFrame, column: str, title: str, full: float | None, width: float) -> Figure:
    cost, loss = points[COST].to_numpy(float), points[column].to_numpy(float)
    best = front(points[[COST, column]].to_numpy(float))
    named = [*best]
    named += [i for i in np.argsort(loss, kind="stable") if i not in set(named)]
    columns = 1 if width < 6 else 2
    entries = min(len(points), _NAMED) + 2
    figure = Figure(figsize=(width, 0.45 * width + 1 + 0.21 * -(-entries // columns)), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    axes.step(cost[best], loss[best], where="post", color=GREY, linewidth=1.2, zorder=1)
    _draw_points(axes, points, column, named, cost, loss)
    if full is not None:
        axes.plot([full], [0], "*", color=GREY, markersize=11, label="full precision", zorder=3)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("BOPs of an evaluation, G (conv + linear)")
    axes.set_ylabel(title, parse_math=False)
    figure.legend(loc="outside lower left", ncols=columns, fontsize=8, frameon=False)
    return figure


def _draw_points(
    axes: Axes, points: pd.DataFrame, column: str, named: list[int], cost: np.ndarray, loss: np.ndarray
) -> None:
    deviations = points[f"{column}.std"].to_numpy(float)
    labels = points["called"].tolist()
    for place, i in enumerate(named):
        known, style = place < _NAMED, points.index[i]
        axes.errorbar(
            [cost[i]], [loss[i]], yerr=None if np.isnan(deviations[i]) else [deviations[i]], capsize=2, zorder=2,
            fmt=_MARKERS[(style + style // len(_COLORS)) % len(_MARKERS)] if known else ".",
            color=_COLORS[style % len(_COLORS)] if known else GREY,
            # a label that begins with "_" would be no label
            label=labels[i].lstrip("_").replace("$", r"\$") if known else None,
        )  # fmt: skip


def _called(row: dict, keys: list[str]) -> str:
    """The experiment, and what else tells it apart."""
    return ", ".join([str(row["name"]), *(f"{key}={row[key]}" for key in keys if key not in ("name", "model"))])


def _full_precision(runs: pd.DataFrame, model: str) -> float | None:
    """Bit operations of the full-precision model in billions, as any of its quantized runs counted them."""
    column = ACCOUNT[VALUES[COST].column]
    if column not in runs:
        return None
    found = runs.loc[runs["config.model.name"] == model, column].dropna()
    return float(found.iloc[0]) * VALUES[COST].factor if len(found) else None
