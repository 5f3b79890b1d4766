"""Curves over the sampling steps as PNG: eps error, statistics of quantization noise, bit schedule.

Sampling runs the noisiest step first, and so does the horizontal axis. Figures are made without matplotlib's global
state, so that any thread may draw.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ptq_exp.errors import DataError
from ptq_exp.files import atomic_path

_DPI = 100
_WIDTH = 10  # inches: 1000 pixels
_STEP_LABEL = "sampling step s (0 = noisiest)"
_THIRDS = ("noisy", "middle", "clean")
# told apart also by those who see red and green alike (Okabe and Ito)
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
_LOG_RANGE = 20  # a curve that spans more than this factor is hard to read on a linear axis
_MARKED_STEPS = 60  # more markers than this run into each other


def plot_eps_error(path: str | os.PathLike, before: Sequence[float], after: Sequence[float], *, title: str) -> None:
    """Relative eps error of each step before and after correction, and its relative change in percent.

    Args:
        path: the .png file, written atomically.
        before, after: ||eps' - eps|| / ||eps|| of each of S steps; a value that is not finite leaves a gap.
        title: over the picture.

    Raises:
        DataError: not two lists of S numbers, a negative one, or no finite one.
        PTQError: the file cannot be written.
    """
    _write(path, _eps_error_figure(before, after, title))


def plot_noise(
    path: str | os.PathLike,
    *,
    k: Sequence[float],
    r: Sequence[float],
    kurtosis: Sequence[float],
    histogram: np.ndarray,
    edges: Sequence[float],
    title: str,
) -> None:
    """Slope, correlation and excess kurtosis of the noise per step, and its standardised residual against N(0, 1).

    Args:
        path: the .png file, written atomically.
        k, r: slope of the error on eps, and their coefficient of correlation, of each of S steps.
        kurtosis: excess kurtosis of the residual, S; 0 for a Gaussian.
        histogram: residuals in units of their standard deviation, counted per step and bin, int [S, B]; the outermost
            bins count also what lies beyond them.
        edges: of the bins, ascending, [B + 1].
        title: over the picture.

    Raises:
        DataError: shapes that do not fit, counts that are no counts, or edges that do not ascend.
        PTQError: the file cannot be written.
    """
    _write(path, _noise_figure(k, r, kurtosis, histogram, edges, title))


def plot_bit_schedule(
    path: str | os.PathLike,
    *,
    bits: Sequence[int],
    output_snr: Mapping[int, Sequence[float]],
    forward_snr: Sequence[float],
    title: str,
) -> None:
    """Activation width of each step, under the signal-to-noise ratios that it may have been chosen by.

    Args:
        path: the .png file, written atomically.
        bits: of each of S steps.
        output_snr: width -> ||eps||^2 / ||eps_q - eps||^2 of each step, S; empty: the widths alone are drawn.
        forward_snr: alpha_bar / (1 - alpha_bar) of each step, S; infinity, such as in the last step, leaves a gap.
        title: over the picture.

    Raises:
        DataError: shapes that do not fit, or widths that are no positive integers.
        PTQError: the file cannot be written.
    """
    _write(path, _bit_schedule_figure(bits, output_snr, forward_snr, title))


def _eps_error_figure(before: Sequence[float], after: Sequence[float], title: str) -> Figure:
    before = _curve("before", before)
    after = _curve("after", after, len(before))
    both = np.concatenate([before, after])
    both = both[~np.isnan(both)]
    if not both.size or both.min() < 0:
        raise DataError("relative eps errors are 0 or more, found negative ones, or none that is finite")
    figure = _figure(6.0, title)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _line(upper, before, _ORANGE, "before correction")
    _line(upper, after, _BLUE, "after correction")
    positive = both[both > 0]
    if positive.size and positive.max() > _LOG_RANGE * positive.min():
        upper.set_yscale("log")
    upper.set_ylabel("relative eps error\n‖ε′ − ε‖ / ‖ε‖")
    upper.legend()
    change = 100 * (np.divide(after, before, out=np.full_like(after, np.nan), where=before > 0) - 1)
    lower.axhline(0, color=_GREY, linewidth=1)
    _line(lower, change, _BLUE)
    if not np.isnan(change).all():
        worst = int(np.nanargmax(change))
        lower.plot([worst], [change[worst]], "o", color=_ORANGE, markersize=9, fillstyle="none", markeredgewidth=2,
                   label=f"worst: step {worst}, {change[worst]:+.1f} %".replace("-", "−"))  # fmt: skip
        lower.legend()
        lower.margins(y=0.2)  # room for the legend
    lower.set_ylabel("change by\ncorrection, %")
    _step_axis(lower, len(before))
    figure.align_ylabels()
    return figure


def _noise_figure(
    k: Sequence[float], r: Sequence[float], kurtosis: Sequence[float], histogram: np.ndarray, edges: Sequence[float],
    title: str,
) -> Figure:  # fmt: skip
    k = _curve("k", k)
    r, kurtosis = _curve("r", r, len(k)), _curve("kurtosis", kurtosis, len(k))
    histogram, edges = _checked_histogram(histogram, edges, len(k))
    figure = _figure(6.6, title)
    grid = figure.add_gridspec(3, 2, width_ratios=(1, 1.1))
    bottom = figure.add_subplot(grid[2, 0])
    panels = [figure.add_subplot(grid[0, 0], sharex=bottom), figure.add_subplot(grid[1, 0], sharex=bottom), bottom]
    labels = ("slope k of the\nerror on ε", "correlation r of\nerror and ε", "excess kurtosis\n(0 = Gaussian)")
    for axes, values, label in zip(panels, (k, r, kurtosis), labels, strict=True):
        axes.axhline(0, color=_GREY, linewidth=1)
        _line(axes, values, _BLUE)
        axes.set_ylabel(label)
    for axes in panels[:2]:
        axes.tick_params(labelbottom=False)
    if (np.abs(kurtosis) > _LOG_RANGE).any():
        bottom.set_yscale("symlog", linthresh=1)
    _step_axis(bottom, len(k))
    figure.align_ylabels(panels)
    _draw_density(figure.add_subplot(grid[:, 1]), histogram, edges)
    return figure


def _draw_density(axes: Axes, histogram: np.ndarray, edges: np.ndarray) -> None:
    """Density of the residual pooled over the thirds of the steps, and that of N(0, 1), on a log axis."""
    lowest = math.inf
    thirds = np.array_split(np.arange(len(histogram)), len(_THIRDS))
    for name, steps, color in zip(_THIRDS, thirds, (_ORANGE, _GREEN, _BLUE), strict=True):
        counts = histogram[steps].sum(0)
        if not counts.any():
            continue
        density = counts / (counts.sum() * np.diff(edges))
        lowest = min(lowest, density[density > 0].min())
        which = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]}–{steps[-1]}"
        # an empty bin is a gap: a logarithmic axis has no 0
        axes.stairs(np.where(density > 0, density, np.nan), edges, baseline=None, color=color, linewidth=1.5,
                    label=f"{name} ({which})")  # fmt: skip
    z = np.linspace(edges[0], edges[-1], 401)
    normal = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    axes.plot(z, normal, "--", color="black", linewidth=1.2, label="N(0, 1)")
    axes.set_yscale("log")
    axes.set_ylim(lowest / 3, None)
    axes.set_xlabel("residual / its standard deviation\n(outermost bins: all beyond)")
    axes.set_ylabel("density")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower center")


def _bit_schedule_figure(
    bits: Sequence[int], output_snr: Mapping[int, Sequence[float]], forward_snr: Sequence[float], title: str
) -> Figure:
    widths = _array("bits", bits)
    if widths.ndim != 1 or not widths.size or widths.dtype.kind not in "iu" or widths.min() < 1:
        found = f"{widths.dtype} of shape {widths.shape}"
        raise DataError(f"bits must be one positive integer for each step, found {found}")
    curves = {width: _curve(f"output_snr[{width}]", output_snr[width], len(widths)) for width in sorted(output_snr)}
    forward = _curve("forward_snr", forward_snr, len(widths))
    figure = _figure(6.0 if curves else 3.2, title)
    lower = figure.add_subplot(2, 1, 2) if curves else figure.add_subplot()
    if curves:
        upper = figure.add_subplot(2, 1, 1, sharex=lower)
        shades = matplotlib.colormaps["viridis"](np.linspace(0.8, 0.1, len(curves)))
        for (width, snr), color in zip(curves.items(), shades, strict=True):
            _line(upper, _positive(snr), color, f"output at {width} bits, ‖ε‖² / ‖ε_q − ε‖²")
        _line(upper, _positive(forward), _ORANGE, r"forward process, $\bar\alpha\,/\,(1-\bar\alpha)$", linestyle="--")
        upper.set_yscale("log")
        upper.set_ylabel("signal-to-noise ratio")
        upper.tick_params(labelbottom=False)
        upper.legend()
    limits = np.arange(len(widths) + 1) - 0.5
    lower.stairs(widths, limits, fill=True, color=_BLUE, alpha=0.25)
    lower.stairs(widths, limits, color=_BLUE, linewidth=1.8, label=f"mean {widths.mean():.2f} bits")
    lower.set_ylim(0, 1.25 * widths.max())
    lower.yaxis.set_major_locator(MaxNLocator(integer=True))
    lower.set_ylabel("activation bits")
    lower.legend(loc="upper right")
    lower.grid(alpha=0.3)
    _step_axis(lower, len(widths))
    return figure


def _figure(height: float, title: str) -> Figure:
    """An empty figure `height` inches high, under a title in which no character is special."""
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    figure.suptitle(title, parse_math=False, wrap=True)
    return figure


def _line(axes: Axes, values: np.ndarray, color: Any, label: str | None = None, linestyle: str = "-") -> None:
    marker = "." if len(values) <= _MARKED_STEPS else None
    steps = np.arange(len(values))
    axes.plot(steps, values, color=color, label=label, linestyle=linestyle, marker=marker, linewidth=1.5)
    axes.grid(alpha=0.3)


def _step_axis(axes: Axes, steps: int) -> None:
    axes.set_xlim(-0.5, steps - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel(_STEP_LABEL)


def _curve(name: str, values: Sequence[float], steps: int | None = None) -> np.ndarray:
    """One float per step, [S]; NaN, which matplotlib leaves out, for all that is not finite."""
    values = _array(name, values, np.float64)
    if values.ndim != 1 or not values.size or steps not in (None, len(values)):
        expected = "one number for each step" if steps is None else f"{steps} numbers, one for each step"
        raise DataError(f"{name} must be {expected}, found shape {values.shape}")
    return np.where(np.isfinite(values), values, np.nan)


def _array(name: str, values: Any, dtype: type | None = None) -> np.ndarray:
    try:
        return np.asarray(values, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} must be numbers in rows of one length: {error}") from error


def _positive(values: np.ndarray) -> np.ndarray:
    """NaN for what a logarithmic axis cannot show."""
    return np.where(values > 0, values, np.nan)


def _checked_histogram(histogram: np.ndarray, edges: Sequence[float], steps: int) -> tuple[np.ndarray, np.ndarray]:
    histogram, edges = _array("histogram", histogram), _array("edges", edges, np.float64)
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


def _write(path: str | os.PathLike, figure: Figure) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
