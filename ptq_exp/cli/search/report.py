"""What a search leaves: a table of its trials, and the experiment file of the best combination."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from ptq_exp.cli.search.coordinate import Trial
from ptq_exp.evaluation.scores import HEADLINE, shown
from ptq_exp.reports.tables.notation import to_markdown


def markdown(trials: Sequence[Trial]) -> str:
    """One row per trial, in the order of the stages; what was chosen is marked."""
    rows = [
        {"stage": trial.stage, "candidate": trial.candidate}
        | {name: trial.metrics.get(name) for name in shown(HEADLINE)}
        | {"": "chosen" if trial.chosen else trial.error}
        for trial in trials
    ]
    return to_markdown(pd.DataFrame(rows), digits=4)


def experiment_file(decided: Sequence[str], name: str, comment: str, groups: Sequence[str]) -> str:
    """The text of a file for conf/experiment with the overrides `decided`.

    Args:
        name: of the runs.
        comment: first lines; without the mark of a comment.
        groups: names of configuration groups: their overrides choose a file, all others set a value.
    """
    pairs = [override.partition("=")[::2] for override in decided]
    defaults = [{f"override /{key}": value} for key, value in pairs if key in groups]
    body: dict[str, Any] = {"defaults": defaults} if defaults else {}
    body["name"] = name
    for key, value in pairs:
        if key in groups:
            continue
        *path, last = key.split(".")
        node = body
        for part in path:
            node = node.setdefault(part, {})
        node[last] = yaml.safe_load(value)
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    return f"# @package _global_\n{head}{yaml.safe_dump(body, sort_keys=False, allow_unicode=True)}"


def config_groups(conf: Path) -> list[str]:
    """Names of the groups in the configuration folder `conf`."""
    return sorted(path.name for path in conf.iterdir() if path.is_dir())
