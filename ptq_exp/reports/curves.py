"""What plots over the sampling steps are drawn with: figures, lines, axes, and numbers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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


def as_curve(values: Sequence[float]) -> np.ndarray:
    """One float per step, [S]; NaN, which matplotlib leaves out, for all that is not finite."""
    values = np.asarray(values, np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def write_figure(path: str | os.PathLike, figure: Figure) -> None:
    """Write the figure as PNG, atomically; the same figure gives the same bytes.

    Raises:
        PTQError: the file cannot be written.
    """
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
