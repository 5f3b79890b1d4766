"""Figures of a report as SVG, each drawn twice: for narrow and for wide windows. No figure touches global state."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, SymmetricalLogLocator

from ptq_exp.reports.html.page import data_uri

WIDE, NARROW = 9.0, 3.7
"""Inches; the narrow one is for windows below 640 pixels."""
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
STEP = "sampling step (0 = noisiest)"
_LOG_RANGE = 20  # a curve that spans more than this factor is hard to read on a linear axis


@dataclass(frozen=True)
class Picture:
    """Addresses of one figure in two widths, and what it shows in words."""

    narrow: str
    wide: str
    alt: str
    caption: str = ""


def drawn(draw: Callable[[float], Figure], alt: str, caption: str = "") -> Picture:
    """The figure that `draw` makes of a width in inches, as a `Picture`."""
    narrow, wide = (_svg(draw(width)) for width in (NARROW, WIDE))
    return Picture(narrow, wide, alt, caption)


def eps_error(after: Sequence[float], before: Sequence[float] | None, width: float) -> Figure:
    """Relative eps error of each step [S], in percent; with a correction also without it."""
    figure, axes = figure_of(width, 0.4 * width + 0.6)
    curves = [(np.asarray(after, float), BLUE, "after correction")]
    if before is not None:
        curves.insert(0, (np.asarray(before, float), ORANGE, "before correction"))
    for values, color, label in curves:
        axes.plot(100 * values, color=color, label=label, marker="." if len(values) <= 60 else None)
    log_if_wide(axes, [100 * values for values, _, _ in curves])
    axes.set_ylabel("relative eps error, %")
    step_axis(axes, len(after))
    if before is not None:
        axes.legend()
    return figure


def fixed_pattern(share: Sequence[float], independent: float, width: float) -> Figure:
    """Share of a fixed pattern in the eps error of each step [S], over that of `independent` errors."""
    figure, axes = figure_of(width, 0.22 * width + 0.8)
    axes.plot(np.asarray(share, float), color=BLUE, marker="." if len(share) <= 60 else None)
    axes.axhline(independent, color=GREY, linewidth=1, linestyle="--", label="independent errors, 1 / √N")
    axes.legend()
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("share of a\nfixed pattern")
    step_axis(axes, len(share))
    return figure


def bit_schedule(bits: Sequence[int], width: float) -> Figure:
    """Activation width of each step [S]."""
    figure, axes = figure_of(width, 0.22 * width + 0.8)
    edges = np.arange(len(bits) + 1) - 0.5
    axes.stairs(bits, edges, fill=True, color=BLUE, alpha=0.25)
    axes.stairs(bits, edges, color=BLUE, linewidth=1.8)
    axes.set_ylim(0, 1.2 * max(bits))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("activation bits")
    step_axis(axes, len(bits))
    return figure


def box_plots(sites: dict[str, np.ndarray], steps: Sequence[int], width: float) -> Figure:
    """Quantiles of activations per step as boxes.

    Args:
        sites: title -> [S, 7] minimum, 1 %, 25 %, 50 %, 75 %, 99 %, maximum.
        steps: sampling steps [S].
        width: inches.
    """
    columns = 1 if width < 6 else min(3, len(sites))
    rows = -(-len(sites) // columns)
    figure = Figure(figsize=(width, 2.3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes, (title, quantiles) in zip(panels.flat, sites.items(), strict=False):
        axes.bxp([_box(row) for row in quantiles], positions=range(len(steps)), widths=0.6, patch_artist=True,
                 boxprops={"facecolor": "#9ecae1", "edgecolor": BLUE}, medianprops={"color": ORANGE, "linewidth": 1.5},
                 whiskerprops={"color": BLUE}, capprops={"color": BLUE},
                 flierprops={"marker": ".", "markersize": 3, "markeredgecolor": GREY})  # fmt: skip
        extreme, box = np.abs(quantiles[:, [0, -1]]).max(), np.median(quantiles[:, 4] - quantiles[:, 2])
        if 0 < _LOG_RANGE * box < extreme:
            axes.set_yscale("symlog", linthresh=box)
            axes.yaxis.set_major_locator(SymmetricalLogLocator(linthresh=box, base=10))
        shown = np.unique(np.linspace(0, len(steps) - 1, min(6, len(steps))).round().astype(int))
        axes.set_xticks(shown, [str(steps[i]) for i in shown])
        axes.set_title(title, fontsize=9, parse_math=False, wrap=True)
        axes.grid(alpha=0.3, axis="y")
    for axes in panels.flat[len(sites) :]:
        axes.set_visible(False)
    figure.supxlabel(STEP, fontsize=10)
    return figure


def figure_of(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure with one axes, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def step_axis(axes: Axes, steps: int) -> None:
    """A horizontal axis over sampling steps."""
    axes.set_xlim(-0.5, steps - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel(STEP)


def log_if_wide(axes: Axes, curves: Sequence[np.ndarray]) -> None:
    """A logarithmic vertical axis where positive values span more than a linear one shows."""
    values = np.concatenate([np.asarray(curve, float).ravel() for curve in curves])
    values = values[np.isfinite(values)]
    if values.size and values.min() > 0 and values.max() > _LOG_RANGE * values.min():
        axes.set_yscale("log")


def _box(quantiles: np.ndarray) -> dict:
    low, whisker_low, q1, median, q3, whisker_high, high = map(float, quantiles)
    return {"med": median, "q1": q1, "q3": q3, "whislo": whisker_low, "whishi": whisker_high, "fliers": [low, high]}


def _svg(figure: Figure) -> str:
    """The figure as a data URI; the same figure gives the same text."""
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "ptq-exp"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return data_uri(stream.getvalue(), ".svg")
