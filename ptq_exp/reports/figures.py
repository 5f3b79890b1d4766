"""Curves over the sampling steps as matplotlib figures; whoever writes them chooses width and format.

Sampling runs the noisiest step first, and so does the horizontal axis. Figures are made without matplotlib's global
state, so that any thread may draw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, SymmetricalLogLocator

from ptq_exp.errors import DataError
from ptq_exp.reports.curves import BLUE, GREEN, GREY, ORANGE, STEP, WIDTH, as_curve, draw, new_figure, step_axis

_THIRDS = ("noisy", "middle", "clean")
_LOG_RANGE = 20  # a curve that spans more than this factor is hard to read on a linear axis


def eps_error(
    before: Sequence[float] | None, after: Sequence[float], *, share: Sequence[float] | None = None,
    share_of_noise: float = 0.0, title: str = "", width: float = WIDTH,
) -> Figure:
    """Draw the relative eps error of each step, its change by a correction in percent, and its fixed pattern.

    Args:
        before, after: ||eps' - eps|| / ||eps|| of each of S steps without and with the correction; a value that is not
            finite leaves a gap. before=None: there is no correction.
        share: of the error `after` that is the same for all samples, S, 0 to 1; None: is not drawn.
        share_of_noise: what that would be without any fixed pattern, drawn as a dashed line.
        title: over the picture.
        width: inches.

    Raises:
        DataError: a negative one, or no finite one.
    """
    before = None if before is None else as_curve(before)
    after = as_curve(after)
    both = np.concatenate([after] if before is None else [before, after])
    both = both[~np.isnan(both)]
    if not both.size or both.min() < 0:
        raise DataError("relative eps errors are 0 or more, found negative ones, or none that is finite")
    heights = [3] + [2] * (before is not None) + [2] * (share is not None)
    figure = new_figure(1 + sum(heights) * (0.55 + 0.045 * width), title, width)
    upper, *lower = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights).flat
    if before is not None:
        draw(upper, before, ORANGE, "before correction")
    draw(upper, after, BLUE, None if before is None else "after correction")
    positive = both[both > 0]
    if positive.size and positive.max() > _LOG_RANGE * positive.min():
        upper.set_yscale("log")
    upper.set_ylabel("relative eps error\n‖ε′ − ε‖ / ‖ε‖")
    if before is not None:
        upper.legend()
        _draw_change(lower[0], before, after)
    if share is not None:
        lower[-1].axhline(share_of_noise, color=GREY, linewidth=1, linestyle="--", label="independent errors, 1 / √N")
        draw(lower[-1], as_curve(share), BLUE)
        lower[-1].set_ylim(0, 1.05)
        lower[-1].set_ylabel("share of a\nfixed pattern")
        lower[-1].legend()
    step_axis([upper, *lower][-1], len(after))
    figure.align_ylabels()
    return figure


def _draw_change(axes: Axes, before: np.ndarray, after: np.ndarray) -> None:
    """Relative change of the error by the correction in percent, with a mark at the worst step."""
    change = 100 * (np.divide(after, before, out=np.full_like(after, np.nan), where=before > 0) - 1)
    axes.axhline(0, color=GREY, linewidth=1)
    draw(axes, change, BLUE)
    if not np.isnan(change).all():
        worst = int(np.nanargmax(change))
        axes.plot([worst], [change[worst]], "o", color=ORANGE, markersize=9, fillstyle="none", markeredgewidth=2,
                  label=f"worst: step {worst}, {change[worst]:+.1f} %".replace("-", "−"))
        axes.legend()
        axes.margins(y=0.2)  # room for the legend
    axes.set_ylabel("change by\ncorrection, %")


def noise(
    *, k: Sequence[float], r: Sequence[float], kurtosis: Sequence[float], histogram: np.ndarray,
    edges: Sequence[float], title: str = "",
) -> Figure:
    """Draw slope, correlation and excess kurtosis of the noise per step, and its standardised residual against N(0, 1).

    Args:
        k, r: slope of the error on eps, and their coefficient of correlation, of each of S steps.
        kurtosis: excess kurtosis of the residual, S; 0 for a Gaussian.
        histogram: residuals in units of their standard deviation, counted per step and bin, int [S, B]; the outermost
            bins count also what lies beyond them.
        edges: of the bins, ascending, [B + 1].
        title: over the picture.
    """
    k, r, kurtosis = map(as_curve, (k, r, kurtosis))
    figure = new_figure(6.6, title)
    grid = figure.add_gridspec(3, 2, width_ratios=(1, 1.1))
    bottom = figure.add_subplot(grid[2, 0])
    panels = [figure.add_subplot(grid[0, 0], sharex=bottom), figure.add_subplot(grid[1, 0], sharex=bottom), bottom]
    labels = ("slope k of the\nerror on ε", "correlation r of\nerror and ε", "excess kurtosis\n(0 = Gaussian)")
    for axes, values, label in zip(panels, (k, r, kurtosis), labels, strict=True):
        axes.axhline(0, color=GREY, linewidth=1)
        draw(axes, values, BLUE)
        axes.set_ylabel(label)
    for axes in panels[:2]:
        axes.tick_params(labelbottom=False)
    if (np.abs(kurtosis) > _LOG_RANGE).any():
        bottom.set_yscale("symlog", linthresh=1)
    step_axis(bottom, len(k))
    figure.align_ylabels(panels)
    _draw_density(figure.add_subplot(grid[:, 1]), histogram, edges)
    return figure


def _draw_density(axes: Axes, histogram: np.ndarray, edges: np.ndarray) -> None:
    """Density of the residual pooled over the thirds of the steps, and that of N(0, 1), on a log axis."""
    lowest = math.inf
    thirds = np.array_split(np.arange(len(histogram)), len(_THIRDS))
    for name, steps, color in zip(_THIRDS, thirds, (ORANGE, GREEN, BLUE), strict=True):
        counts = histogram[steps].sum(0)
        if not counts.any():
            continue
        density = counts / (counts.sum() * np.diff(edges))
        lowest = min(lowest, density[density > 0].min())
        which = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]}–{steps[-1]}"
        # an empty bin is a gap: a logarithmic axis has no 0
        axes.stairs(np.where(density > 0, density, np.nan), edges, baseline=None, color=color, linewidth=1.5,
                    label=f"{name} ({which})")
    z = np.linspace(edges[0], edges[-1], 401)
    normal = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    axes.plot(z, normal, "--", color="black", linewidth=1.2, label="N(0, 1)")
    axes.set_yscale("log")
    axes.set_ylim(lowest / 3, None)
    axes.set(xlabel="residual / its standard deviation\n(outermost bins: all beyond)", ylabel="density")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower center")


def bit_schedule(
    bits: Sequence[int], *, output_snr: Mapping[int, Sequence[float]] | None = None,
    forward_snr: Sequence[float] | None = None, title: str = "", width: float = WIDTH,
) -> Figure:
    """Draw the activation width of each step, under the signal-to-noise ratios that it may have been chosen by.

    Args:
        bits: of each of S steps.
        output_snr: width -> ||eps||^2 / ||eps_q - eps||^2 of each step, S; None or empty: the widths alone are drawn.
        forward_snr: alpha_bar / (1 - alpha_bar) of each step, S; infinity, such as in the last step, leaves a gap.
        title: over the picture.
        width: inches.
    """
    widths = np.asarray(bits)
    curves = {size: as_curve(snr) for size, snr in sorted((output_snr or {}).items())}
    figure = new_figure(6.0 if curves else 0.24 * width + 0.8, title, width)
    lower = figure.add_subplot(2, 1, 2) if curves else figure.add_subplot()
    if curves:
        upper = figure.add_subplot(2, 1, 1, sharex=lower)
        shades = matplotlib.colormaps["viridis"](np.linspace(0.8, 0.1, len(curves)))
        for (size, snr), color in zip(curves.items(), shades, strict=True):
            draw(upper, _positive(snr), color, f"output at {size} bits, ‖ε‖² / ‖ε_q − ε‖²")
        if forward_snr is not None:
            name = r"forward process, $\bar\alpha\,/\,(1-\bar\alpha)$"
            draw(upper, _positive(as_curve(forward_snr)), ORANGE, name, linestyle="--")
        upper.set_yscale("log")
        upper.set_ylabel("signal-to-noise ratio")
        upper.tick_params(labelbottom=False)
        upper.legend()
    limits = np.arange(len(widths) + 1) - 0.5
    lower.stairs(widths, limits, fill=True, color=BLUE, alpha=0.25)
    lower.stairs(widths, limits, color=BLUE, linewidth=1.8, label=f"mean {widths.mean():.2f} bits")
    lower.set_ylim(0, 1.25 * widths.max())
    lower.yaxis.set_major_locator(MaxNLocator(integer=True))
    lower.set_ylabel("activation bits")
    lower.legend(loc="upper right")
    lower.grid(alpha=0.3)
    step_axis(lower, len(widths))
    return figure


def box_plots(sites: dict[str, np.ndarray], steps: Sequence[int], width: float) -> Figure:
    """Draw quantiles of activations per step as boxes.

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
                 flierprops={"marker": ".", "markersize": 3, "markeredgecolor": GREY})
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


def _positive(values: np.ndarray) -> np.ndarray:
    """NaN for what a logarithmic axis cannot show."""
    return np.where(values > 0, values, np.nan)


def _box(quantiles: np.ndarray) -> dict:
    low, whisker_low, q1, median, q3, whisker_high, high = map(float, quantiles)
    return {"med": median, "q1": q1, "q3": q3, "whislo": whisker_low, "whishi": whisker_high, "fliers": [low, high]}
