"""The ablation of noise correction over many runs: a block per model, sampler and bits, a row per part of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ptq_exp.errors import DataError
from ptq_exp.reports.tables.labels import natural
from ptq_exp.reports.tables.settings import BITS, is_idle, with_effect
from ptq_exp.reports.tables.tables import APART, add_percent, aggregate_apart

MODEL, SAMPLER, ETA = "config.model.name", "config.sampler.name", "config.sampler.eta"
BLOCK = (MODEL, SAMPLER, ETA, BITS)
"""Columns in which the rows of one block agree."""
TITLES = {
    MODEL: "model",
    SAMPLER: "sampler",
    ETA: "eta",
    BITS: "bits",
    "correction": "correction",
    "metrics.fid": "FID",
    "metrics.sfid": "sFID",
    "metrics.is": "IS",
    "metrics.psnr": "PSNR dB",
    "metrics.eps_error_percent": "eps error %",
    "quantization.bops_ratio": "BOPs ratio",
    "seeds": "seeds",
}
"""Column of `ablation` -> heading."""
REFERENCE = "FP32"
_NAME = "config.correction.name"
_ROWS = {
    "none": "baseline",
    "bias": "+ bias",
    "correlation": "+ correlation",
    "mean": "+ correlation, bias",
    "ptqd": "+ variance",
}
_MIXED = "+ mixed precision"
_ORDER = (REFERENCE, *_ROWS.values(), _MIXED)
# A deviation below this is the rounding of equal numbers.
_ROUNDING = 1e-9


def ablation(runs: pd.DataFrame) -> pd.DataFrame:
    """What each part of the noise correction brings, as PTQD (NeurIPS 2023) tabulates it; mean ± std over seeds.

    A block holds the runs of one model, sampler, eta and bits, in the rows "baseline" (no correction), "+ bias",
    "+ correlation", "+ correlation, bias", "+ variance" as far as there are such runs. Under a bit schedule (bits
    called step_...) the last is "+ mixed precision". The full-precision runs of a model, sampler and eta stand as
    "FP32" before its blocks; wider bits come before narrower ones and those before schedules. Runs from before there
    were corrections count as uncorrected. Runs of one row that differ in another setting have rows, in blocks, of their
    own.

    Args:
        runs: from `collect`. Unreadable ones are left out, unfinished ones shown where no run of their row finished.

    Returns:
        The columns of `TITLES`, "metric_spec", f"{v}.std" for each value v, and the settings that tell further rows
        apart, which `attrs[APART]` names. The ratio of bit operations has no deviation where all seeds agree. Runs with
        different metric specs stand in rows of their own.

    Raises:
        DataError: no run says what it was.
    """
    if BITS not in runs or runs[BITS].isna().all():
        raise DataError("none of the results says with which bits it was made: run an experiment first")
    runs = add_percent(_with_rows(runs[runs[BITS].notna()]), {"metrics.eps_error_percent": "metrics.eps_error"})
    by = [*BLOCK, "correction"]
    values = [column for column in TITLES if column not in (*by, "seeds")]
    table = aggregate_apart(runs, by, values, over="config.seed")
    by += table.attrs[APART]
    table = table.sort_values("seeds", key=lambda seeds: seeds == "", kind="stable")
    table = table[(table["seeds"] != "") | ~table.duplicated(by)]
    places = [_place(row, table.attrs[APART]) for row in table.to_dict("records")]
    table = table.iloc[sorted(range(len(table)), key=places.__getitem__)].reset_index(drop=True)
    deviation = table["quantization.bops_ratio.std"]
    table["quantization.bops_ratio.std"] = deviation.where(deviation > _ROUNDING)
    return table


def _with_rows(runs: pd.DataFrame) -> pd.DataFrame:
    """`runs` with the column "correction", the name of their row, and without the settings that changed nothing."""
    runs = with_effect(runs)
    rows = [_row_name(*pair) for pair in zip(runs[BITS], runs[_NAME], strict=True)]
    return runs.assign(correction=rows)


def _row_name(bits: str, correction: str | None) -> str:
    if bits == "fp32":
        return REFERENCE
    if bits.startswith("step_") and correction == "ptqd":
        return _MIXED
    return _ROWS.get(correction, f"+ {correction}")


def _place(row: Mapping[str, Any], apart: Sequence[str]) -> tuple:
    """Sort key of a row: model, sampler, eta, then bits (full precision, widest first, schedules), then correction.

    Of the settings `apart`, those that full precision has, too, come before the bits, the others after them.
    """
    bits, correction, eta = row[BITS], row["correction"], row[ETA]
    widths = re.fullmatch(r"w(\d+)a(\d+)", bits)
    if correction == REFERENCE:
        width = (0,)
    else:
        width = (1, *(-int(number) for number in widths.groups())) if widths else (2,)
    part = _ORDER.index(correction) if correction in _ORDER else len(_ORDER)
    shared, others = ([natural(row[column]) for column in apart if is_idle(column) == idle] for idle in (False, True))
    eta = -1.0 if math.isnan(eta) else eta
    return str(row[MODEL]), str(row[SAMPLER]), eta, *shared, width, bits, *others, part, correction
