"""The runs that tables are made of, one row each, from results.json."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from ptq_exp.errors import DataError
from ptq_exp.storage.plain_json import flatten, read_json

_LABELS, _RUNTIME, _PAIRS = "config.calibration.labels", "config.runtime.name", "config.evaluation.pairs"
"""Settings that older runs lack: they paired states and times, executed the simulation, and measured PSNR of pairs."""
_WEIGHTS = {"weights.model": "config.model.weights"}
_log = logging.getLogger(__name__)


def collect(runs_dir: str | os.PathLike) -> pd.DataFrame:
    """One row per results.json below `runs_dir`, nested keys joined by dots ("metrics.fid", "config.seed").

    Two columns are added: "run", the folder relative to runs_dir, and "modified", the file's time in seconds.
    A file that cannot be read is logged and gives a row with status "unreadable". A key that a run lacks is
    missing (NaN) in its row; lists stay lists.

    Raises:
        DataError: `runs_dir` holds no results.json.
    """
    return gather([runs_dir])


def gather(folders: Iterable[str | os.PathLike]) -> pd.DataFrame:
    """Return the rows of `collect` for everything below several folders; a run that is found twice counts once.

    Args:
        folders: run folders, folders of many of them, or the offline W&B folder (offline-run-...) of a run, which
            stands for the run.

    Raises:
        DataError: there is nothing to read.
    """
    folders = [_of_run(Path(folder)) for folder in folders]
    rows: dict[Path, dict[str, Any]] = {}
    for folder in folders:
        found = {path.parent.resolve(): _row(path, folder) for path in _in_order(folder)}
        if len(folders) > 1:  # two sweeps have a job 0 each
            for row in found.values():
                row["run"] = (folder / row["run"]).as_posix()
        rows |= found
    if not rows:
        where = ", ".join(map(str, folders))
        raise DataError(f"no results.json below {where}: run an experiment first or name another folder")
    return pd.DataFrame(list(rows.values()))


def _of_run(folder: Path) -> Path:
    """Return the run of an offline W&B folder (RUN/wandb/offline-run-...); other folders as they are."""
    run = folder.parent.parent
    return run if folder.parent.name == "wandb" and (run / "results.json").is_file() else folder


def _in_order(folder: Path) -> list[Path]:
    """Return the results below `folder`, in the order of their names, where job 2 comes before job 10."""
    return sorted(folder.rglob("results.json"), key=lambda path: re.sub(r"\d+", lambda m: m[0].zfill(20), str(path)))


def _row(path: Path, runs_dir: Path) -> dict[str, Any]:
    row = {"run": path.parent.relative_to(runs_dir).as_posix(), "modified": path.stat().st_mtime}
    row |= {"name": None, "status": None}  # of a file that is no experiment's
    try:
        values = read_json(path)
        if not isinstance(values, dict):
            raise DataError(f"{path} holds a {type(values).__name__}, expected an object")
    except DataError as error:
        _log.warning("%s", error)
        return row | {"status": "unreadable"}
    flat = flatten(values)
    return row | completed(flat)


def completed(flat: dict[str, Any]) -> dict[str, Any]:
    """Complete the columns of a run by settings that are newer; the simulation, as runtime, has no options."""
    flat = with_weights(flat)
    if "config.calibration.name" in flat:
        flat = {_LABELS: "paired"} | flat
    if "config.evaluation.name" in flat:
        flat = {_PAIRS: []} | flat
    if "config.bits.name" in flat and flat.setdefault(_RUNTIME, "simulate") == "simulate":
        flat = {key: value for key, value in flat.items() if key == _RUNTIME or not key.startswith("config.runtime.")}
    return flat


def with_weights(flat: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of a run in which the digest of its weights is a setting: one path may have held several."""
    return {_WEIGHTS.get(key, key): value for key, value in flat.items()}
