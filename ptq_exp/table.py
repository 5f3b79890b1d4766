"""Print a table of many runs: `python -m ptq_exp.table runs/sweeps/<time>`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

import pandas as pd

from ptq_exp.errors import DataError, PTQError
from ptq_exp.tracking import ablation
from ptq_exp.tracking.tables import add_percent, aggregate, caption, collect, to_latex, to_markdown

TITLES = {
    "name": "experiment",
    "config.metric.name": "metric",
    "metrics.fid": "FID",
    "metrics.sfid": "sFID",
    "metrics.is": "IS",
    "metrics.fid_increase_units": "FID increase",
    "metrics.psnr": "PSNR dB",
    "metrics.eps_error_percent": "eps error %",
    "quantization.coverage_percent": "coverage %",
    "quantization.bops_ratio": "BOPs ratio",
}
"""Column of the results -> heading."""
FORMATS = ("markdown", "latex")
_SHARES = {
    "metrics.eps_error_percent": "metrics.eps_error",
    "quantization.coverage_percent": "quantization.coverage_conv_linear",
}
_HELP = """
layouts:
  experiments   a row per experiment and metric: FP32 first, then in the order of the FID increase
  ablation      a block per model, sampler, eta and bits; its rows: no correction, then one part of it after another

Numbers are mean ± std over the seeds of finished runs. Runs that differ in a setting are never averaged: name a
folder whose runs agree. LaTeX needs \\usepackage{booktabs}.

examples:
  python -m ptq_exp.table runs/sweeps
  python -m ptq_exp.table runs/sweeps --layout ablation --format latex > ablation.tex
"""


def experiment_table(runs_dir: str, form: str = "markdown") -> str:
    """One row per experiment and metric, mean ± std over seeds, and the caption.

    The FP32 row stands first, then the rows in the order of their FID increase, then those without a finished run.

    Args:
        runs_dir: see `collect`.
        form: one of `FORMATS`.

    Raises:
        PTQError: there are no results, or runs that differ in a setting would be averaged.
    """
    runs = add_percent(collect(runs_dir), _SHARES)
    if "config.bits.name" not in runs:
        raise DataError(f"no results.json below {runs_dir} can be read: run the experiments again")
    runs.loc[runs["config.bits.name"] == "fp32", "config.metric.name"] = "-"
    values = [column for column in TITLES if column not in ("name", "config.metric.name")]
    table = aggregate(runs, ["name", "config.metric.name"], values)
    table = table.sort_values("metrics.fid_increase_units", na_position="first", kind="stable")
    table = table.sort_values("seeds", key=lambda seeds: seeds == "", kind="stable")
    # coverage and BOPs do not depend on the seed
    table = table.drop(columns=[f"{column}.std" for column in values if column.startswith("quantization.")])
    return _printed(table, TITLES, form, "tab:experiments")


def ablation_table(runs_dir: str, form: str = "markdown") -> str:
    """The table of `ptq_exp.tracking.ablation` and its caption.

    Args:
        runs_dir: see `collect`.
        form: one of `FORMATS`.

    Raises:
        PTQError: there are no results, or runs that differ in a setting would be averaged.
    """
    table = ablation.ablation(collect(runs_dir))
    table[ablation.ETA] = table[ablation.ETA].map("{:g}".format, na_action="ignore")
    return _printed(table, ablation.TITLES, form, "tab:ablation", ablation.BLOCK)


LAYOUTS = {"experiments": experiment_table, "ablation": ablation_table}


def _printed(table: pd.DataFrame, titles: Mapping[str, str], form: str, label: str, blocks: Sequence[str] = ()) -> str:
    if form == "latex":
        return to_latex(table, titles, digits=2, caption=caption(table), label=label, blocks=blocks)
    return f"{to_markdown(table, titles, digits=2)}\n{caption(table)}"


def main(argv: list[str] | None = None) -> None:
    """Entry point; exit code 1 and one line on standard error for anything the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m ptq_exp.table",
        description=__doc__,
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="?", default="runs", help="folder that is searched for results.json (runs)")
    parser.add_argument("--layout", choices=LAYOUTS, default="experiments", help="which table (experiments)")
    parser.add_argument("--format", choices=FORMATS, default="markdown", help="how it is written (markdown)")
    arguments = parser.parse_args(argv)
    try:
        print(LAYOUTS[arguments.layout](arguments.runs, arguments.format))
    except PTQError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
