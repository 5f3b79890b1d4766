"""The Pareto front of two things that should both be small, and its picture."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ptq_exp.errors import DataError
from ptq_exp.reports.curves import BLUE, GREEN, GREY, ORANGE, WIDTH, new_figure

_COLORS = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # as in Okabe and Ito
_MARKERS = "osD^vPX"
_NAMED = 28  # more entries than this fill a legend that nobody reads


def on_front(values: np.ndarray) -> np.ndarray:
    """Which rows of `values` [N, 2] no other row dominates: bool [N]; both columns are to be small.

    A row dominates another one if it is nowhere larger and somewhere smaller. Rows that are not finite are on no front.
    """
    values = np.asarray(values, dtype=float)
    finite = np.isfinite(values).all(1)
    no_larger = (values[:, None] <= values[None]).all(2) & finite[:, None]
    smaller = (values[:, None] < values[None]).any(2)
    return finite & ~(no_larger & smaller).any(0)


def front(values: np.ndarray) -> np.ndarray:
    """Numbers of the rows of `values` [N, 2] that are on the front, by rising first column."""
    found = np.flatnonzero(on_front(values))
    return found[np.lexsort(np.asarray(values, dtype=float)[found].T[::-1])]


def front_figure(
    points: pd.DataFrame, cost: str, loss: str, width: float = WIDTH, *, names: tuple[str, str],
    full_precision: float | None = None, title: str = "",
) -> Figure:
    """Draw points by cost (x, logarithmic) and loss (y), and the front as a line; the front comes first in the legend.

    Args:
        points: rows with the columns `cost`, `loss`, "called" and, where there is one, f"{loss}.std". The index of a
            row chooses its colour and marker.
        names: of the two axes.
        full_precision: cost of the full-precision model, which loses nothing.
        width: inches.

    Raises:
        DataError: no row has both numbers.
    """
    points = points[np.isfinite(points[[cost, loss]].to_numpy(float)).all(1)]
    if points.empty:
        raise DataError(f"no run has both {names[0]} and {names[1]}")
    best = front(points[[cost, loss]].to_numpy(float))
    named = [*best, *(i for i in np.argsort(points[loss].to_numpy(float), kind="stable") if i not in set(best))]
    columns = 1 if width < 6 else 2
    entries = min(len(points), _NAMED) + 2
    figure = new_figure(0.45 * width + 1 + 0.21 * -(-entries // columns), title, width)
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    x, y = points[cost].to_numpy(float), points[loss].to_numpy(float)
    axes.step(x[best], y[best], where="post", color=GREY, linewidth=1.2, zorder=1)
    _draw_points(axes, points, (cost, loss), named)
    if full_precision is not None:
        axes.plot([full_precision], [0], "*", color=GREY, markersize=11, label="full precision", zorder=3)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(names[0], parse_math=False)
    axes.set_ylabel(names[1], parse_math=False)
    figure.legend(loc="outside lower left", ncols=columns, fontsize=8, frameon=False)
    return figure


def _draw_points(axes: Axes, points: pd.DataFrame, places: tuple[str, str], named: list[int]) -> None:
    """Each point with its deviation; the first of `named` in colour and in the legend."""
    cost, loss = (points[column].to_numpy(float) for column in places)
    nothing = pd.Series(np.nan, index=points.index)
    deviations, labels = points.get(f"{places[1]}.std", nothing).to_numpy(float), points["called"].tolist()
    for place, i in enumerate(named):
        known, style = place < _NAMED, points.index[i]
        axes.errorbar(
            [cost[i]], [loss[i]], yerr=None if np.isnan(deviations[i]) else [deviations[i]], capsize=2, zorder=2,
            fmt=_MARKERS[(style + style // len(_COLORS)) % len(_MARKERS)] if known else ".",
            color=_COLORS[style % len(_COLORS)] if known else GREY,
            # a label that begins with "_" would be no label
            label=labels[i].lstrip("_").replace("$", r"\$") if known else None,
        )
