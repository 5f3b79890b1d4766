"""Print the table of many runs: `python -m ptq_exp.table runs/sweeps/<time>`."""

from __future__ import annotations

import argparse
import sys

from ptq_exp.errors import PTQError
from ptq_exp.tracking.tables import aggregate, caption, collect, to_markdown

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


def experiment_table(runs_dir: str) -> str:
    """Markdown: one row per experiment and metric, mean ± std over seeds, and the caption.

    The FP32 row stands first, then the rows in the order of their FID increase.

    Raises:
        PTQError: there are no results, or runs that differ in a setting would be averaged.
    """
    runs = collect(runs_dir)
    for share, source in (("metrics.eps_error", None), ("quantization.coverage", "conv_linear")):
        column = f"{share}_{source}" if source else share
        runs[f"{share}_percent"] = 100 * runs[column] if column in runs else float("nan")
    runs.loc[runs["config.bits.name"] == "fp32", "config.metric.name"] = "-"
    values = [column for column in TITLES if column not in ("name", "config.metric.name")]
    table = aggregate(runs, ["name", "config.metric.name"], values)
    table = table.sort_values("metrics.fid_increase_units", na_position="first", kind="stable")
    # coverage and BOPs do not depend on the seed
    table = table.drop(columns=[f"{column}.std" for column in values if column.startswith("quantization.")])
    return f"{to_markdown(table, TITLES, digits=2)}\n{caption(table)}"


def main(argv: list[str] | None = None) -> None:
    """Entry point; exit code 1 and one line on standard error for anything the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m ptq_exp.table", description=__doc__)
    parser.add_argument("runs", nargs="?", default="runs", help="folder that is searched for results.json")
    try:
        print(experiment_table(parser.parse_args(argv).runs))
    except PTQError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
