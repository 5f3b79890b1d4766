"""A `ResultTable` as text, as CSV, or as a table in W&B."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import pandas as pd

from ptq_exp.errors import ConfigError
from ptq_exp.reports.tables.notation import to_latex, to_markdown
from ptq_exp.reports.tables.request import ResultTable
from ptq_exp.reports.tables.wandb_source import TABLE_TAG
from ptq_exp.results import wandb as wandb_run

FORMATS = ("markdown", "latex", "csv")


def render(table: ResultTable, form: str = "markdown", label: str = "results") -> str:
    r"""Write the table as text, notes below it (Markdown) or in its caption (LaTeX, booktabs); CSV has no notes.

    Args:
        form: one of `FORMATS`.
        label: of LaTeX's `\ref`, after "tab:".

    Raises:
        ConfigError: an unknown format.
    """
    if form == "csv":
        return plain_frame(table).to_csv(index=False)
    if form == "latex":
        caption = " ".join(f"{sentence.rstrip('.')}." for sentence in [table.title, *table.notes] if sentence)
        return to_latex(
            table.frame, table.titles, table.digits, groups=table.groups, caption=caption, label=f"tab:{label}",
            blocks=table.blocks,
        )
    if form != "markdown":
        raise ConfigError(f"format={form!r} is unknown, expected one of {', '.join(FORMATS)}")
    title = f"**{table.title}**\n\n" if table.title else ""
    notes = "".join(f"- {note}\n" for note in table.notes)
    return f"{title}{to_markdown(table.frame, table.titles, table.digits, groups=table.groups)}\n{notes}"


def plain_frame(table: ResultTable) -> pd.DataFrame:
    """Numbers for further use: a column of text per key; per value v the columns v, v.std, v.n, v.delta, v.low, v.high.

    Those of deviations, differences and intervals only where a row has one.
    """
    frame = table.frame.drop(columns=[column for column in table.frame if column.endswith((".n", ".best"))])
    empty = [column for column in frame if column.endswith((".std", ".delta")) and frame[column].isna().all()]
    return frame.drop(columns=empty).rename(columns=lambda column: re.sub(r"\.runs$", ".n", column))


def to_wandb(
    table: ResultTable, target: str, save_dir: str | os.PathLike, name: str, settings: Mapping[str, Any]
) -> str:
    """Write the table into a W&B run of its own, as a `wandb.Table`; its title and notes are the run's settings.

    Args:
        target: "entity/project", or "offline".
        save_dir: folder for W&B's files.
        name: of the run and of the table.
        settings: how the table was asked for.

    Returns:
        Where it is: the run's address, or its folder.

    Raises:
        ConfigError: no valid key, or `target` is neither.
        PTQError: the server does not answer.
    """
    entity, _, project = target.partition("/")
    if target != "offline" and (not entity or not project or "/" in project):
        raise ConfigError(f"--to-wandb {target}: expected entity/project, or offline")
    place = {} if target == "offline" else {"entity": entity, "project": project}
    config = {"title": table.title, "notes": table.notes, "table": dict(settings)}
    logger = wandb_run.make_logger(
        "online" if place else "offline", save_dir, name=f"table-{name}", tags=[TABLE_TAG], config=config, **place
    )
    exit_code = 1
    try:
        frame = plain_frame(table)
        wandb_run.log_table(logger, name, frame.astype(object).where(frame.notna(), None))
        exit_code = 0
        return logger.experiment.url if place else logger.experiment.dir
    finally:
        wandb_run.finish(logger, exit_code)
