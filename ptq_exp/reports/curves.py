"""What plots over the sampling steps are drawn with: figures, lines, axes, and numbers that are checked first."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ptq_exp.errors import DataError
from ptq_exp.storage.atomic import atomic_path

_DPI = 100
WIDTH = 10
"""Inches of a picture of its own: 1000 pixels."""
STEP = "sampling step s (0 = noisiest)"
_MARKED_STEPS = 60  # more markers than this run into each other
# distinguishable also for those who see red and green alike (Okabe and Ito)
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"


def new_figure(height: float, title: str = "", width: float = WIDTH) -> Figure:
    """Return an empty figure of so many inches, under a title in which no character is special."""
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    if title:
        figure.suptitle(title, parse_math=False, wrap=True)
    return figure


def draw(axes: Axes, values: np.ndarray, color: Any, label: str | None = None, linestyle: str = "-") -> None:
    """One value per step, [S], with a mark on each where there is room."""
    marker = "." if len(values) <= _MARKED_STEPS else None
    steps = np.arange(len(values))
    axes.plot(steps, values, color=color, label=label, linestyle=linestyle, marker=marker, linewidth=1.5)
    axes.grid(alpha=0.3)


def step_axis(axes: Axes, steps: int) -> None:
    """Let the horizontal axis run over the sampling steps."""
    axes.set_xlim(-0.5, steps - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel(STEP)


def as_curve(name: str, values: Sequence[float], steps: int | None = None) -> np.ndarray:
    """One float per step, [S]; NaN, which matplotlib leaves out, for all that is not finite.

    Raises:
        DataError: they are no numbers, or not as many as there are steps; the message begins with `name`.
    """
    values = as_array(name, values, np.float64)
    if values.ndim != 1 or not values.size or steps not in (None, len(values)):
        expected = "one number for each step" if steps is None else f"{steps} numbers, one for each step"
        raise DataError(f"{name} must be {expected}, found shape {values.shape}")
    return np.where(np.isfinite(values), values, np.nan)


def as_array(name: str, values: Any, dtype: type | None = None) -> np.ndarray:
    """`values` as an array.

    Raises:
        DataError: they are none; the message begins with `name`.
    """
    try:
        return np.asarray(values, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} must be numbers in rows of one length: {error}") from error


def as_histogram(histogram: np.ndarray, edges: Sequence[float], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return counts [S, B] and the ascending edges [B + 1] of their bins.

    Raises:
        DataError: they are not that, or do not fit; the message begins with the name of one.
    """
    histogram, edges = as_array("histogram", histogram), as_array("edges", edges, np.float64)
    if edges.ndim != 1 or len(edges) < 2 or not np.isfinite(edges).all() or (np.diff(edges) <= 0).any():
        raise DataError(f"edges must be two or more ascending finite numbers, found shape {edges.shape}")
    if histogram.shape != (steps, len(edges) - 1) or histogram.dtype.kind not in "iu":
        raise DataError(
            f"histogram must be integers of shape {(steps, len(edges) - 1)} (steps, bins), found {histogram.dtype} of "
            f"shape {histogram.shape}"
        )
    if not histogram.any() or histogram.min() < 0:
        raise DataError("histogram must hold counts: none is negative and not all are 0")
    return histogram, edges


def write_figure(path: str | os.PathLike, figure: Figure) -> None:
    """Write the figure as PNG, atomically; the same figure gives the same bytes.

    Raises:
        PTQError: the file cannot be written.
    """
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
