"""The Pareto plot of a sweep: what quantization costs in quality over the bit operations that are left."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ptq_exp.reports.html.compare import SETTINGS
from ptq_exp.reports.html.figures import GREY, drawn
from ptq_exp.reports.html.section import Section

COST = "quantization.bops_giga"
LOSSES = {
    "metrics.fid_increase_units": "FID increase over FP32",
    "metrics.eps_error_percent": "relative eps error, %",
}
"""What is drawn over bit operations; less is better."""
# told apart also by those who see red and green alike (Okabe and Ito)
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "osD^vPX"
_NAMED = 28  # more entries than this fill a legend that nobody reads


def pareto_section(averaged: pd.DataFrame, runs: pd.DataFrame) -> Section | None:
    """A plot for each model and loss that was measured at two or more points; None where there is none.

    Args:
        averaged: from `groups`.
        runs: all runs, for the bit operations of full precision.
    """
    pictures = []
    for model, rows in averaged.groupby("config.model.name", sort=False) if len(averaged) else ():
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


def pareto_front(cost: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Numbers of the points that no other one beats, by rising cost: none is as low in both and lower in one.

    Args:
        cost, loss: [N], less is better.
    """
    order = np.lexsort((loss, cost))
    best, front = np.inf, []
    for i in order:
        if loss[i] < best:
            front.append(i)
            best = loss[i]
    return np.array(front, int)


def _figure(points: pd.DataFrame, column: str, title: str, full: float | None, width: float) -> Figure:
    cost, loss = points[COST].to_numpy(float), points[column].to_numpy(float)
    named = [*pareto_front(cost, loss)]
    named += [i for i in np.argsort(loss, kind="stable") if i not in set(named)]
    columns = 1 if width < 6 else 2
    entries = min(len(points), _NAMED) + 2
    figure = Figure(figsize=(width, 0.45 * width + 1 + 0.21 * -(-entries // columns)), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    front = pareto_front(cost, loss)
    axes.step(cost[front], loss[front], where="post", color=GREY, linewidth=1.2, zorder=1)
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
    labels = [_called(row, points.attrs[SETTINGS]) for row in points.to_dict("records")]
    for place, i in enumerate(named):
        known, style = place < _NAMED, points.index[i]
        axes.errorbar(
            [cost[i]], [loss[i]], yerr=None if np.isnan(deviations[i]) else [deviations[i]], capsize=2, zorder=2,
            fmt=_MARKERS[(style + style // len(_COLORS)) % len(_MARKERS)] if known else ".",
            color=_COLORS[style % len(_COLORS)] if known else GREY,
            # a label that begins with "_" would be no label
            label=labels[i].lstrip("_").replace("$", r"\$") if known else None,
        )  # fmt: skip


def _called(row: dict, settings: list[str]) -> str:
    """The experiment, and what else tells it apart."""
    others = [f"{column.removeprefix('config.').removesuffix('.name')}={row[column]}" for column in settings[1:]
              if column != "config.model.name"]  # fmt: skip
    return ", ".join([str(row["name"]), *others])


def _full_precision(runs: pd.DataFrame, model: str) -> float | None:
    """Bit operations of the full-precision model in billions, as any of its quantized runs counted them."""
    column = "quantization.bops_fp32_giga"
    if column not in runs:
        return None
    found = runs.loc[runs["config.model.name"] == model, column].dropna()
    return float(found.iloc[0]) if len(found) else None
