"""The runs of an online W&B project as the rows that `collect` makes of results.json."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from ptq_exp.errors import ConfigError, DataError, one_line
from ptq_exp.reports.tables.runs import completed, with_weights
from ptq_exp.storage.plain_json import flatten, restore

TABLE_TAG = "ptq-exp-table"
"""Tag of the W&B runs that hold nothing but a table: no experiments."""
_SECTIONS = ("metric_spec", "quantization", "real", "weights", "intervals")  # as they are in results.json
_OF_QUANTIZATION = ("coverage_conv_linear", "bops_ratio", "bops_ratio_everything")  # logged beside the scores
_SERVICE = ("_wandb", "trainer", "graph")


def online_rows(project: str, base_url: str | None = None, api_key: str | None = None) -> list[dict[str, Any]]:
    """Every run of a W&B project as a row; tables that were logged are left out.

    Args:
        project: "entity/project".
        base_url: of another server than W&B's own (or WANDB_BASE_URL).
        api_key: None takes that of `wandb login` or WANDB_API_KEY.

    Raises:
        ConfigError: no such project, or no valid key.
        DataError: the server does not answer, or the project has no runs.
    """
    import requests
    import wandb
    from wandb.errors import AuthenticationError, CommError, UsageError

    if project.count("/") != 1 or not all(project.split("/")):
        raise ConfigError(f"--wandb {project}: expected entity/project")
    try:
        with _scratch_folder():
            overrides = {"base_url": base_url} if base_url else {}
            api = wandb.Api(overrides=overrides, api_key=api_key)
            rows = [_online_row(run) for run in api.runs(project, lazy=False) if TABLE_TAG not in (run.tags or [])]
    except (AuthenticationError, UsageError) as error:
        raise ConfigError(f"--wandb {project} needs a valid W&B key: run `wandb login` or set WANDB_API_KEY") from error
    except (CommError, requests.RequestException) as error:
        raise DataError(f"--wandb {project}: the server does not answer ({one_line(error)})") from error
    except ValueError as error:  # what wandb raises for a project that is not there
        raise ConfigError(f"--wandb {project}: {one_line(error)}") from error
    if not rows:
        raise DataError(f"--wandb {project} has no runs")
    return rows


def _online_row(run: Any) -> dict[str, Any]:
    status = {"finished": "finished", "running": "running", "pending": "running"}.get(run.state, "failed")
    error = {"error": run.state} if status == "failed" else {}
    made = datetime.fromisoformat(run.created_at.replace("Z", "+00:00")).timestamp() if run.created_at else 0.0
    row = {"run": f"{run.name} ({run.id})", "modified": made, "status": status} | error
    return row | recorded(run.config, run.summary_metrics)


def recorded(config: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of results.json out of what an experiment logs to W&B."""
    config = {key: restore(value) for key, value in config.items() if key not in _SERVICE}
    row = {"name": config.get("name"), "seed": config.get("seed")} | completed(flatten(config, "config."))
    for key, value in summary.items():
        value = restore(value)
        if key in _SECTIONS and isinstance(value, Mapping):
            row |= flatten(value, f"{key}.")
        elif isinstance(value, bool) or not isinstance(value, int | float) or key.startswith("_"):
            continue
        elif key.startswith("fp32/"):
            row[f"fp32.{key.removeprefix('fp32/')}"] = value
        elif key in _OF_QUANTIZATION:
            row[f"quantization.{key}"] = value
        elif "/" not in key:
            row[f"metrics.{key}"] = value
    return with_weights(row)


@contextmanager
def _scratch_folder() -> Iterator[None]:
    """Let W&B's reader make its folders, one for each run, where they are removed again."""
    before = os.environ.get("WANDB_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["WANDB_DIR"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["WANDB_DIR"]
            else:
                os.environ["WANDB_DIR"] = before
