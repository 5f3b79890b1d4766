"""What the columns of collected runs mean: short names of settings and values, and which settings had an effect."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import pandas as pd

from ptq_exp.errors import ConfigError, nearest
from ptq_exp.evaluation.scores import HEADLINE, SCORES, shown
from ptq_exp.reports.tables.identity import SPEC, exact, metric_spec, plain, settings_of

BITS = "config.bits.name"
FULL_PRECISION, DERIVED = "full_precision", "derived"
"""Columns that are added: whether a run is of the full-precision model, and whether it is none, but made of the scores
of full-precision images that quantized runs report."""
IDLE_GROUPS = ("bits", "calibration", "metric", "quantization", "reconstruction", "correction")
"""Groups without effect on the full-precision model, though they are part of its run's configuration."""
_LABELS = ("name", "config.name")  # a run may be called anything; what it did is in the other settings


@dataclass(frozen=True)
class Value:
    """A number of a run: heading, column, by what that is multiplied, and which way it is better (1: higher)."""

    heading: str
    column: str
    better: int = 0
    digits: int = 2
    factor: float = 1.0

    @property
    def interval(self) -> str:
        """The column of its 95 % interval [low, high], which not every run has."""
        return f"intervals.{self.column.removeprefix('metrics.')}"


def _of_scores() -> dict[str, Value]:
    """Return a value for each score, and one in percent where it is read so."""
    values = {}
    for name, score in SCORES.items():
        values[name] = Value(score.heading, f"metrics.{name}", score.better, score.digits)
        if score.percent:
            values[f"{name}_percent"] = Value(score.percent, f"metrics.{name}", score.better, factor=100)
    return values


VALUES = _of_scores() | {
    "coverage_percent": Value("coverage %", "quantization.coverage_conv_linear", 1, factor=100),
    "bops_g": Value("BOPs G", "quantization.bops.conv_linear", -1, factor=1e-9),
    "bops_t": Value("BOPs T", "quantization.bops.conv_linear", -1, factor=1e-12),
    "bops_ratio": Value("BOPs ratio", "quantization.bops_ratio", 1),
    "size_mb": Value("size MB", "quantization.weight_bytes", -1, factor=1e-6),
    "calibration_seconds": Value("calibration s", "calibration_seconds.total", -1, 0),
    "size_reduction": Value("size ratio", "quantization.size_reduction", 1),
    "int8_percent": Value("int8 %", "runtime.int8_share", 1, factor=100),
    "int8_speedup": Value("FP32 ms / int8 ms", "runtime.faster_than.torch_fp32", 1),
    "engine_psnr": Value("PSNR to simulation", "runtime.psnr", 1, 1),
    "engine_error_percent": Value("error to simulation %", "runtime.eps_error", -1, factor=100),
}
"""Short names of the numbers that tables usually hold; any other number of results.json can be named in full."""
HEADLINE_VALUES = [f"{name}_percent" if score.percent else name for name, score in shown(HEADLINE).items()]
"""What tables of many runs show where nothing else is asked for."""
_SECTIONS = ("config.", "metrics.", "quantization.", "")


def key_column(key: str, columns: Iterable[str]) -> str:
    """Return the column of a configuration key: "bits" is config.bits.name, "sampler.eta" config.sampler.eta.

    Raises:
        ConfigError: no run has such a setting; the message names those that are near.
    """
    columns = set(columns)
    for column in (key, f"config.{key}.name", f"config.{key}"):
        if column in columns and (column.startswith("config.") or column in ("name", "run")):
            return column
    known = {name for column in columns if column.startswith("config.") for name in _short_names(column)} | {"name"}
    raise ConfigError(f"{key}: no such configuration key; {_near(key, known)}")


def _short_names(column: str) -> list[str]:
    key = column.removeprefix("config.")
    return [key, key.removesuffix(".name")] if key.endswith(".name") else [key]


def value_of(name: str, columns: Iterable[str]) -> Value:
    """Return the value called `name`: one of `VALUES`, or the column metrics.NAME, quantization.NAME or NAME.

    Raises:
        ConfigError: no run has such a number; the message names those that are near.
    """
    if name in VALUES:
        return VALUES[name]
    columns = set(columns)
    for column in (f"{section}{name}" for section in _SECTIONS):
        if column in columns:
            return Value(name, column)
    known = set(VALUES) | {column.removeprefix("metrics.") for column in columns if not column.startswith("config.")}
    raise ConfigError(f"{name}: no such value; {_near(name, known)}")


def _near(word: str, known: Collection[str]) -> str:
    parts = sorted(name for name in known if name.startswith(f"{word}."))[:5]
    return f"did you mean {' or '.join(map(repr, parts))}?" if parts else nearest(word, known, 3)


def is_idle(column: str) -> bool:
    """Whether the setting has no effect on the full-precision model."""
    return column in _LABELS or (column.startswith("config.") and column.split(".")[1] in IDLE_GROUPS)


def prepared(runs: pd.DataFrame, settings: Iterable[str] = ()) -> pd.DataFrame:
    """Return `runs` as `with_effect` makes them, without names and bits of full-precision runs, and with their costs.

    Full-precision runs get the bit operations and the size that quantized runs of the same model report for it.

    Args:
        settings: further columns that may be asked for, missing where no run has them.
    """
    runs = runs.assign(**{column: None for column in settings if column not in runs})
    runs = with_effect(runs)
    blank = [column for column in (*_LABELS, BITS) if column in runs]
    gone = {column: runs[column].astype(object).where(~runs[FULL_PRECISION], None) for column in blank}
    return _with_costs(runs.assign(**gone))


def with_effect(runs: pd.DataFrame) -> pd.DataFrame:
    """Return `runs` with `FULL_PRECISION`, `SPEC` and `DERIVED`, and without the settings that changed nothing.

    Missing become: in full precision all of `IDLE_GROUPS` but the name of the bits; without a correction or
    reconstruction, the other settings of these groups. Runs from before there were such groups count as runs without.
    """
    added = {}
    for group in ("correction", "reconstruction"):
        name = f"config.{group}.name"
        if name not in runs:
            added[name] = "none"
        else:
            runs = runs.assign(**{name: runs[name].where(runs[name].notna(), "none")})
    spec = [metric_spec(row) for row in runs.to_dict("records")]
    full_precision = (runs[BITS] == "fp32") if BITS in runs else pd.Series(False, index=runs.index)
    runs = runs.assign(**added, **{SPEC: spec, FULL_PRECISION: full_precision, DERIVED: False})
    blank = {}
    for column in map(str, runs):
        idle = full_precision if is_idle(column) and column not in (*_LABELS, BITS) else None
        for group in ("correction", "reconstruction"):
            if column.startswith(f"config.{group}.") and column != f"config.{group}.name":
                idle = full_precision | (runs[f"config.{group}.name"] == "none")
        if idle is not None:
            blank[column] = runs[column].astype(object).where(~idle, None)
    return runs.assign(**blank)


OF_REFERENCE = {
    "quantization.bops.conv_linear": "quantization.bops_fp32.conv_linear",
    "quantization.bops.everything": "quantization.bops_fp32.everything",
    "quantization.weight_bytes": "quantization.fp32_bytes",
}
"""{number of a network: that of the full-precision network, as a quantized run reports it}."""
RATIOS = ("quantization.bops_ratio", "quantization.bops_ratio_everything", "quantization.size_reduction")


def _with_costs(runs: pd.DataFrame) -> pd.DataFrame:
    """Bit operations and size of full-precision runs, where all quantized runs of the model agree about them."""
    model = "config.model.name"
    if model not in runs:
        return runs
    runs = runs.copy()
    for column, of_reference in OF_REFERENCE.items():
        if column not in runs or of_reference not in runs:
            continue
        for name, rows in runs.groupby(model):
            found = set(pd.to_numeric(rows[of_reference]).dropna())
            if len(found) == 1:
                mine = runs[FULL_PRECISION] & (runs[model] == name)
                runs.loc[mine, column] = exact(found.pop())
                for ratio in RATIOS:
                    if ratio in runs:
                        runs.loc[mine, ratio] = 1.0
    return runs


def with_references(runs: pd.DataFrame) -> pd.DataFrame:
    """Add the full-precision images that finished quantized runs have scored, once, as runs marked `DERIVED`.

    A table needs no other runs for its row FP32. `runs` are what `prepared` returns.
    """
    columns = [*map(str, runs)]
    scores = {column: f"metrics.{column.removeprefix('fp32.')}" for column in columns if column.startswith("fp32.")}
    if not scores:
        return runs
    makers = runs[~runs[FULL_PRECISION] & (runs["status"] == "finished") & runs[list(scores)].notna().any(axis=1)]
    shared = [column for column in settings_of(columns) if not is_idle(column) and column != "config.quantized"]
    shared += [column for column in columns if column == "config.seed"]
    references = {}
    for row in makers.to_dict("records"):
        kept = (*shared, SPEC, "seed", "run", "modified", "status")
        reference = {column: row[column] for column in kept if column in row} | dict.fromkeys(RATIOS, 1.0)
        reference |= {mine: row[its] for its, mine in scores.items()}
        reference |= {mine: exact(row[its]) for mine, its in OF_REFERENCE.items() if its in row}
        key = json.dumps([plain(row[column]) for column in (*shared, SPEC)])
        references.setdefault(key, reference | {FULL_PRECISION: True, DERIVED: True})
    if not references:
        return runs
    added = pd.DataFrame(list(references.values())).astype(object)
    both = pd.concat([runs.assign(**{DERIVED: False}).astype(object), added], ignore_index=True)
    return both.where(both.notna(), None).infer_objects()
