"""The Pareto front of two things that should both be small, and its picture."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ptq_exp.errors import DataError
from ptq_exp.storage.atomic import atomic_path

_BLUE, _GREY = "#0072B2", "#999999"


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


def plot_front(
    path: str | os.PathLike, table: pd.DataFrame, cost: str, error: str, labels: Sequence[str], *, title: str
) -> None:
    """All rows of `table` by cost (x) and error (y), those with `front` true joined by a line and labelled, as PNG.

    Raises:
        DataError: no row has both numbers.
        PTQError: the file cannot be written.
    """
    shown = table[np.isfinite(table[[cost, error]].to_numpy(float)).all(1)]
    if shown.empty:
        raise DataError(f"{path}: no row has both {cost} and {error}")
    figure = Figure(figsize=(10, 6), layout="constrained", dpi=100)
    axes = figure.add_subplot()
    axes.scatter(shown[cost], shown[error], color=_GREY, label="dominated")
    best = shown[shown["front"]].sort_values(cost)
    axes.plot(best[cost], best[error], "o-", color=_BLUE, drawstyle="steps-post", label="Pareto front")
    for (_, row), label in zip(best.iterrows(), labels, strict=True):
        axes.annotate(label, (row[cost], row[error]), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set(xlabel=cost, ylabel=error, title=title)
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, metadata={"Software": None})
