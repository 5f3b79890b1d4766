"""What `+experiment=analyze` measured: activation ranges per step and sensitivity of layers, from analysis.npz."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ptq_exp.reports.figures import box_plots
from ptq_exp.reports.html.section import Section, drawn
from ptq_exp.reports.html.table import Cell, Table, number, text
from ptq_exp.storage.npz import npz_arrays

FILE = "analysis.npz"
PANELS = 6
_LOW, _HIGH = 1, -2  # columns of the 1 % and the 99 % quantile


def activation_section(folder: Path) -> Section | None:
    """Box plots of the first and last site and of those whose range changes most, all in a table; None without them."""
    arrays = _arrays(folder)
    if "activations" not in arrays:
        return None
    sites, steps, activations = arrays["sites"].tolist(), arrays["steps"].tolist(), arrays["activations"]
    ends = list(dict.fromkeys([0, len(sites) - 1]))
    chosen = [*ends, *(i for i in most_changing(activations) if i not in ends)][:PANELS]
    shown = {_called(sites[i]): activations[i] for i in chosen}
    caption = (
        "Boxes: quartiles and median; whiskers: 1 % and 99 %; dots: minimum and maximum of all values. Of the full-"
        "precision model: its first and its last quantized activation, and those whose 1 % to 99 % range changes most "
        "between steps. Where extremes would hide the boxes, the axis is logarithmic away from zero."
    )
    picture = drawn(lambda width: box_plots(shown, steps, width), "Box plots of activations per sampling step", caption)
    table = _site_table(sites, steps, activations)
    return Section(
        "activations", "Activation ranges per step", pictures=[picture],
        folded_tables=[(f"All {len(sites)} activations", table)],
    )


def sensitivity_section(folder: Path) -> Section | None:
    """Draw the relative eps error of each layer when it alone is quantized, as bars, the worst first; or None."""
    arrays = _arrays(folder)
    if "sensitivity" not in arrays:
        return None
    layers, error = arrays["layers"].tolist(), arrays["sensitivity"]
    mean, worst_step = error.mean(1), arrays["sensitivity_steps"][error.argmax(1)]
    largest = max(float(mean.max()), 1e-30)
    rows = [
        [
            text(layers[i]), Cell("", float(mean[i]), bar=100 * float(mean[i]) / largest), number(mean[i], "{:.3%}"),
            number(error[i].max(), "{:.3%}"), number(int(worst_step[i]), "{:.0f}"),
        ]
        for i in np.argsort(-mean, kind="stable")
    ]
    columns = [("layer", False), ("", True), ("eps error", True), ("at worst", True), ("in step", True)]
    sentence = (
        "Weight and activations of one layer at a time are quantized, all else stays in full precision. The error is "
        f"‖ε_layer − ε‖ / ‖ε‖, mean over {error.shape[1]} steps of full-precision trajectories that no range was "
        "chosen on. Attention stands for its softmax map."
    )
    return Section(
        "sensitivity", "Sensitivity of each layer", text=[sentence],
        tables=[Table(columns, rows, "Sensitivity of each layer", order=(2, "descending"))],
    )


def most_changing(activations: np.ndarray) -> list[int]:
    """Numbers of the sites by the ratio of their widest to their narrowest 1 % to 99 % range, the largest first.

    Args:
        activations: quantiles [O, S, Q] as `analyse` writes them.
    """
    return np.argsort(-_spread(activations)[0], kind="stable").tolist()


def _spread(activations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ratio [O] of the widest to the narrowest range over steps (0 for a constant), and the ranges [O, S]."""
    width = activations[..., _HIGH] - activations[..., _LOW]
    narrowest = width.min(1)
    return np.divide(width.max(1), narrowest, out=np.zeros_like(narrowest), where=narrowest > 0), width


def _site_table(sites: list[str], steps: list[int], activations: np.ndarray) -> Table:
    ratio, width = _spread(activations)
    rows = []
    for i in most_changing(activations):
        widest, narrowest = int(width[i].argmax()), int(width[i].argmin())
        rows.append([
            text(_called(sites[i])), number(activations[i, :, 0].min()), number(activations[i, :, _LOW].min()),
            number(np.median(activations[i, :, 3])), number(activations[i, :, _HIGH].max()),
            number(activations[i, :, -1].max()), number(width[i, narrowest]), number(steps[narrowest], "{:.0f}"),
            number(width[i, widest]), number(steps[widest], "{:.0f}"), number(ratio[i] or None, "{:.2f}"),
        ])
    columns = [("activation", False), ("minimum", True), ("1 %", True), ("median", True), ("99 %", True),
               ("maximum", True), ("narrowest", True), ("in step", True), ("widest", True), ("in step", True),
               ("ratio", True)]
    note = "Extremes over all steps; narrowest and widest: the range from 1 % to 99 % within a step."
    return Table(columns, rows, "All activations", note=note, order=(len(columns) - 1, "descending"))


def _called(site: str) -> str:
    """`a.b.input_quantizer` as "a.b, input"."""
    layer, _, role = site.rpartition(".")
    return f"{layer}, {role.removesuffix('_quantizer')}"


def _arrays(folder: Path) -> dict[str, np.ndarray]:
    path = folder / FILE
    return npz_arrays(path) if path.is_file() else {}
