"""Tables of many runs: `python -m ptq_exp table runs/sweeps/<time>`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd

from ptq_exp.cli.commands import parser_of
from ptq_exp.errors import ConfigError, DataError, command_line
from ptq_exp.reports.tables.columns import VALUES
from ptq_exp.reports.tables.layouts import Layout, find_layout, layouts
from ptq_exp.reports.tables.render import FORMATS, render, to_wandb
from ptq_exp.reports.tables.request import Request, ResultTable
from ptq_exp.reports.tables.result_table import result_table
from ptq_exp.reports.tables.runs import gather
from ptq_exp.reports.tables.wandb_source import online_rows
from ptq_exp.settings.compose import config_folder
from ptq_exp.settings.names import setting_names
from ptq_exp.storage.atomic import atomic_path
from ptq_exp.storage.paths import PathArgument, with_home

__all__ = ["layout_list", "layout_table", "main", "make_table"]
Runs = str | os.PathLike | pd.DataFrame
_DEFAULT = "experiments"
_HELP = f"""
what is read:
  folders with results.json (runs), or the offline W&B folder of a run (RUN/wandb/offline-run-*), which stands for it;
  with --wandb entity/project the runs of an online project instead

layouts:
  files of conf/table: --list shows all, each with the sweep that fills it; a .yaml file of your own works, too
  experiments   (the default) a row per experiment and metric: FP32 first, then in the order of the FID increase
  ablation      a block per model, sampler, eta and bits; its rows: no correction, then one part of it after another

keys and values:
  A key is a configuration key: a group (calibration, bits, metric, model, ...) or a setting (sampler.eta,
  quantization.shortcut, calibration.distribution.mean, ...), or name, the experiment's.
  Values: {", ".join(VALUES)};
  or any number in results.json (seconds.quantize, fp32.fid, ...).

Numbers are mean ± std over the seeds of finished runs, the best in bold. Runs that differ in a setting are never
averaged: name a folder whose runs agree, make the setting a row or a column, or choose with --where. Runs that were
scored differently have rows of their own. LaTeX needs \\usepackage{{booktabs}}.

examples:
  python -m ptq_exp table runs/sweeps
  python -m ptq_exp table runs/sweeps --layout ablation --format latex > ablation.tex
  python -m ptq_exp table runs/sweeps --rows calibration --cols bits --values fid,sfid,is --delta
  python -m ptq_exp table runs/sweeps --rows metric --where bits=w8a8 --where calibration=ndtc --format csv
  python -m ptq_exp table --list
  python -m ptq_exp table runs/sweeps --layout ptq4dm_metric
  python -m ptq_exp table --wandb me/ptq-exp --rows name --to-wandb me/ptq-exp
"""
def make_table(runs: Runs, request: Request) -> ResultTable:
    """Build the table that `request` describes; `render` prints it.

    Args:
        runs: a folder, or what `gather` made of some.

    Raises:
        PTQError: there are no results, an unknown key or value, or runs that differ in a setting would be averaged.
    """
    runs = runs if isinstance(runs, pd.DataFrame) else gather([runs])
    return result_table(runs, request, [f"config.{name}" for name in setting_names()])


def layout_table(runs: Runs, name: str) -> ResultTable:
    """Return the table of a layout in `conf/table/`, or of a layout file.

    Raises:
        PTQError: as `make_table`, or there is no such layout.
    """
    return make_table(runs, find_layout(with_home(name, "layout"), config_folder() / "table").request)


def layout_list() -> str:
    """One line for each ready-made layout, and below it the commands that fill it."""
    lines = []
    for layout in layouts(config_folder() / "table"):
        lines += [f"{layout.name:24}{layout.request.title}", *(f"    {command}" for command in layout.command)]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("table", __doc__, _HELP)
    add = parser.add_argument
    add("runs", nargs="*", default=["runs"], action=PathArgument, help="folders that are searched for runs (runs)")
    add("--layout", metavar="NAME", help="a ready-made table, one of --list (experiments)")
    add("--list", action="store_true", help="show the layouts of conf/table and the sweeps that fill them")
    add("--rows", metavar="KEYS", help="configuration keys that choose the rows, separated by commas")
    add("--cols", metavar="KEYS", help="keys that choose the columns")
    add("--values", metavar="NAMES", help="the numbers to show (fid,sfid,is)")
    add("--agg", metavar="KEYS", help="keys over which numbers are averaged (seed)")
    add("--where", metavar="KEY=VALUES", action="append", default=[], help="only these runs; can be given again")
    add("--delta", action="store_true", help="add the difference to the FP32 row, over the same seeds")
    add("--no-fp32", action="store_true", help="without the FP32 row")
    add("--format", choices=FORMATS, default="markdown", help="how it is written (markdown)")
    add("--output", metavar="FILE", action=PathArgument, help="write it into this file")
    add("--wandb", metavar="ENTITY/PROJECT", help="read the runs of this W&B project instead of folders")
    add("--wandb-url", metavar="URL", help="of a W&B server of one's own")
    add("--to-wandb", metavar="ENTITY/PROJECT", help="write the table into W&B, too; offline: into --wandb-dir")
    add("--wandb-dir", metavar="DIR", default="runs/tables", action=PathArgument,
        help="for the files of --to-wandb (runs/tables)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point; exit code 1 and one line on standard error for anything the user can mend."""
    logging.basicConfig(format="%(message)s")
    with command_line():
        arguments = _parser().parse_intermixed_args(argv)
        text = layout_list() if arguments.list else _table(arguments)
        if arguments.output:
            with atomic_path(arguments.output) as temporary:
                temporary.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
        else:
            print(text.rstrip("\n"))


def _table(arguments: argparse.Namespace) -> str:
    """Return the table that the command line asks for, as text; with --to-wandb it goes there, too."""
    chosen = _layout(arguments)
    table = make_table(_runs(arguments), chosen.request)
    if arguments.to_wandb:
        if arguments.wandb_url:
            os.environ["WANDB_BASE_URL"] = arguments.wandb_url
        folder = Path(arguments.wandb_dir) / time.strftime("%Y-%m-%d_%H-%M-%S")
        asked = {key: value for key, value in vars(arguments).items() if value}
        print(f"W&B table: {to_wandb(table, arguments.to_wandb, folder, chosen.name, asked)}", file=sys.stderr)
    if arguments.format == "csv":
        print("\n".join(table.notes), file=sys.stderr)
    return render(table, arguments.format, chosen.name)


def _layout(arguments: argparse.Namespace) -> Layout:
    """Return the layout that is named, with what else is asked for; rows without a name are a layout of their own."""
    asked = {key: _names(value) for key in ("rows", "cols", "values", "agg") if (value := getattr(arguments, key))}
    where = dict(map(_condition, arguments.where))
    if arguments.layout is None and asked.get("rows"):
        layout = Layout("table", Request(rows=()), ())
    else:
        layout = find_layout(with_home(arguments.layout or _DEFAULT, "--layout"), config_folder() / "table")
    request = replace(layout.request, **asked, where={**layout.request.where, **where})
    if "rows" in asked:
        request = replace(request, blocks=[key for key in request.blocks if key in asked["rows"]])
    if arguments.delta:
        request = replace(request, delta=True)
    return replace(layout, request=replace(request, fp32=request.fp32 and not arguments.no_fp32))


def _runs(arguments: argparse.Namespace) -> pd.DataFrame:
    if arguments.wandb:
        return pd.DataFrame(online_rows(arguments.wandb, arguments.wandb_url))
    if missing := [folder for folder in arguments.runs if not Path(folder).is_dir()]:
        raise DataError(f"no results.json below {missing[0]}: there is no such folder")
    return gather(arguments.runs)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _condition(text: str) -> tuple[str, list]:
    key, equals, values = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--where {text}: expected KEY=VALUE or KEY=VALUE,VALUE")
    return key.strip(), [_scalar(value.strip()) for value in values.split(",")]


def _scalar(text: str) -> str | int | float | bool | None:
    """Return a setting as it is typed: a number, true, false, null, or a word."""
    words: dict[str, bool | None] = {"true": True, "false": False, "null": None}
    if text in words:
        return words[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
