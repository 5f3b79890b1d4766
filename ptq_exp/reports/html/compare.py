"""The runs of a sweep by what was varied: which settings differ, and the means over seeds of each combination."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ptq_exp.reports.tables.identity import exact, metric_spec, newest, settings_of, text_of
from ptq_exp.reports.tables.labels import letter
from ptq_exp.reports.tables.tables import NOTES, add_percent

MEASURED = {
    "metrics.fid": ("FID", "{:.2f}"),
    "metrics.fid_increase_units": ("FID increase", "{:.2f}"),
    "metrics.sfid": ("sFID", "{:.2f}"),
    "metrics.is": ("IS", "{:.2f}"),
    "metrics.psnr": ("PSNR dB", "{:.2f}"),
    "metrics.eps_error_percent": ("eps error %", "{:.2f}"),
    "quantization.coverage_percent": ("coverage %", "{:.2f}"),
    "quantization.bops_giga": ("BOPs, G", "{:.4g}"),
    "quantization.bops_ratio": ("FP32 BOPs / BOPs", "{:.2f}"),
}
"""Column of the results -> heading and number format."""
SETTINGS = "settings"
"""Key of `DataFrame.attrs`: the columns that tell the rows of `groups` apart."""
_PERCENT = {
    "metrics.eps_error_percent": "metrics.eps_error",
    "quantization.coverage_percent": "quantization.coverage_conv_linear",
}


def with_readable_units(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs of `ptq_exp.reports.tables.tables.collect`, with percents and billions beside shares and bit operations."""
    nothing = pd.Series(float("nan"), index=runs.index)
    giga = {f"quantization.{new}": runs.get(f"quantization.{old}.conv_linear", nothing) / 1e9
            for new, old in (("bops_giga", "bops"), ("bops_fp32_giga", "bops_fp32"))}  # fmt: skip
    return add_percent(runs, _PERCENT).assign(**giga)


def varied_settings(runs: pd.DataFrame) -> list[str]:
    """The columns of settings, the experiment's name first, that tell the `runs` apart.

    What a name implies is left out: the settings of a group (`config.bits.weight`) that are the same in all runs with
    the group's choice (`config.bits.name`), and what is the same in all runs of an experiment.
    """
    plain = runs[["name", *settings_of(runs)]].map(text_of)
    columns = [column for column in settings_of(plain) if plain[column].nunique() > 1]
    kept = ["name"]
    for column in sorted(columns, key=lambda column: (not column.endswith(".name"), columns.index(column))):
        group = f"config.{column.split('.')[1]}.name"
        implied_by = [name for name in ("name", group) if name in plain and name != column]
        if all((plain.groupby(name)[column].nunique() > 1).any() for name in implied_by):
            kept.append(column)
    return kept


def groups(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per combination of varied settings: these, "seeds", and mean and `.std` of each of `MEASURED`.

    Of finished runs; of several with the same settings and seed the newest counts. `attrs[SETTINGS]` names the columns
    that tell the rows apart ("scored" among them, where runs were scored differently), `attrs[NOTES]` is what was left
    out.
    """
    finished = runs[runs["status"] == "finished"]
    if finished.empty:
        return pd.DataFrame()
    settings = varied_settings(finished)
    specs = [metric_spec(row) for row in finished.to_dict("records")]
    kinds = list(dict.fromkeys(specs))
    if len(kinds) > 1:
        finished = finished.assign(scored=[letter(kinds, spec) for spec in specs])
        settings = [*settings, "scored"]
    kept, notes = newest(finished, [*settings, "seed"])
    kept = kept.sort_index()
    keys = kept[settings].map(text_of).agg("\n".join, axis=1)
    rows: list[dict[str, Any]] = []
    for _, members in kept.groupby(keys, sort=False):
        members = members.sort_values("seed")
        row = {column: members[column].iloc[0] for column in settings}
        row["seeds"] = ", ".join(str(exact(seed)) for seed in members["seed"])
        row["config.model.name"] = members["config.model.name"].iloc[0] if "config.model.name" in members else "—"
        for column in MEASURED:
            numbers = pd.to_numeric(members[column]) if column in members else pd.Series(dtype=float)
            row[column], row[f"{column}.std"] = numbers.mean(), numbers.std()
        rows.append(row)
    table = pd.DataFrame(rows)
    table.attrs |= {SETTINGS: settings, NOTES: notes}
    return table
