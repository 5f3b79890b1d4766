"""The result of a search for bits per group of layers: the front of FID and bit operations, as table and picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ptq_exp.reports.curves import write_figure
from ptq_exp.reports.pareto import front_figure, on_front
from ptq_exp.storage.atomic import atomic_path

COST = "GBOPs"


def write_pareto(folder: Path, jobs: dict[str, dict[str, Any]], swept: list[str]) -> str:
    """Write pareto.csv (every job) and pareto.png to `folder`; returns the front as text, cheapest first.

    Raises:
        DataError: no job has finished.
        PTQError: a file cannot be written.
    """
    groups = [key.removeprefix("bits.groups.") for key in swept if key.startswith("bits.groups.")]
    table = pd.DataFrame([_row(name, values, groups) for name, values in jobs.items()])
    error = "FID" if table["FID"].notna().any() else "eps error"
    done = table["status"] == "finished"
    table["front"] = on_front(table[[COST, error]].where(done, np.nan).to_numpy(float))
    with atomic_path(folder / "pareto.csv") as temporary:
        table.to_csv(temporary, index=False, encoding="utf-8")
    front = table[table["front"]].sort_values(COST)
    points = table[done].assign(called=[" ".join(f"{g} {row[g]}" for g in groups) for _, row in table[done].iterrows()])
    title = f"bits per group of layers, {folder.name}"
    write_figure(folder / "pareto.png", front_figure(points, COST, error, names=(COST, error), title=title))
    shown = front.drop(columns=["status", "front"]).to_string(index=False, float_format="{:.4g}".format)
    return f"Pareto front of {error} and bit operations ({len(front)} of {int(done.sum())} runs):\n{shown}"


def _row(name: str, values: dict[str, Any], groups: list[str]) -> dict[str, Any]:
    """One line of pareto.csv; groups that were left at the bits of the network say so."""
    bits = values.get("config", {}).get("bits", {})
    widths = {group: bits.get("groups", {}).get(group) or bits.get("name") for group in groups}
    cost = values.get("quantization") or values.get("budget") or {}
    bops = cost.get("bops", {}).get("conv_linear", np.nan)
    metrics = values.get("metrics", {})
    return {
        "job": name, "status": values["status"], **widths, COST: bops / 1e9,
        "BOPs ratio": cost.get("bops_ratio", np.nan), "FID": metrics.get("fid", np.nan),
        "eps error": metrics.get("eps_error", np.nan),
    }
