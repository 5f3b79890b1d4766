"""Ready-made tables: YAML files that name rows, columns, values and filters, and the sweep that fills them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ptq_exp.errors import ConfigError, nearest, one_line
from ptq_exp.reports.tables.columns import VALUES
from ptq_exp.reports.tables.request import BY_RUN, Published, PublishedRow, Request, RowLabel, idle_key

_KEYS = {
    "title": str, "rows": list, "cols": list, "values": list, "agg": list, "where": dict, "delta": bool,
    "command": list, "published": list, "apart": bool, "sort": str, "labels": list, "blocks": list,
}
_REQUIRED = ("title", "rows", "values", "command")


@dataclass(frozen=True)
class Layout:
    """A table that can be asked for by name: what it shows, and the commands whose runs fill it."""

    name: str
    request: Request
    command: tuple[str, ...]


def layouts(folder: Path) -> list[Layout]:
    """Every layout of a folder, by name."""
    return [read_layout(path) for path in sorted(folder.glob("*.yaml"))]


def find_layout(name: str, folder: Path) -> Layout:
    """Return the layout called `name` in `folder`, or in the file `name`.

    Raises:
        ConfigError: there is none of that name, or it is no valid layout.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if path.is_file():
        return read_layout(path)
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    raise ConfigError(f"--layout {name}: no such layout; {nearest(name, known)} (or give the path of a .yaml file)")


def read_layout(path: str | os.PathLike) -> Layout:
    """Read the layout in a YAML file; `conf/table/` has examples.

    Keys: title, rows, values, command (needed); cols, agg (seed), where, delta, apart, sort, blocks, labels, published
    (see `Request`). A list of one may be written without brackets. Each entry of `labels` has a key of the rows with a
    value of it, may have further keys, each with a glob, and `label`, what then stands there. Each entry of
    `published` has heading, source and rows, each row the row's keys (or fp32: true) and its figures.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown, missing or of the wrong kind.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is no readable YAML file: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(content).__name__}")
    values = {key: _checked(path, key, value) for key, value in content.items()}
    if lacking := [key for key in _REQUIRED if not values.get(key)]:
        raise ConfigError(f"{path}: {lacking[0]} is missing")
    command, rows = values.pop("command"), values["rows"]
    request = Request(**values | {
        "where": {key: one if isinstance(one, list) else [one] for key, one in values.get("where", {}).items()},
        "published": [_published(path, entry, rows) for entry in values.get("published", [])],
        "labels": [_label(path, entry, rows) for entry in values.get("labels", [])],
    })
    if unknown := [key for key in request.blocks if key not in request.rows]:
        raise ConfigError(f"{path}: blocks: {unknown[0]} is no key of the rows; {nearest(unknown[0], request.rows)}")
    return Layout(path.stem, request, tuple(command))


def _checked(path: Path, key: Any, value: Any) -> Any:
    if key not in _KEYS:
        raise ConfigError(f"{path}: {key}: no such key; {nearest(str(key), _KEYS)}")
    kind = _KEYS[key]
    if kind is list and isinstance(value, str):
        value = [value]
    if not isinstance(value, kind):
        raise ConfigError(f"{path}: {key}={value}: expected a {kind.__name__}, found a {type(value).__name__}")
    if kind is list and key not in ("published", "labels") and not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{path}: {key}={value}: expected a list of names")
    if key == "sort" and value not in ("", BY_RUN, *VALUES):
        raise ConfigError(f"{path}: sort={value}: no such value; {nearest(value, [BY_RUN, *VALUES])}")
    return value


def _label(path: Path, entry: Any, rows: list[str]) -> RowLabel:
    """{"correction": "ptqd", "bits": "step_*", "label": "mixed"}: the first key is the one whose choice it replaces."""
    where = {key: str(value) for key, value in entry.items() if key != "label"} if isinstance(entry, Mapping) else {}
    if not where or "label" not in entry or not set(where) <= set(rows):
        raise ConfigError(f"{path}: labels: {entry}: expected label and keys of the rows ({', '.join(rows)})")
    return RowLabel(next(iter(where)), where, str(entry["label"]))


def _published(path: Path, entry: Any, rows: list[str]) -> Published:
    if not isinstance(entry, Mapping) or set(entry) != {"heading", "source", "rows"}:
        raise ConfigError(f"{path}: each entry of published needs heading, source and rows, and nothing else")
    return Published(entry["heading"], entry["source"], tuple(_row(path, row, rows) for row in entry["rows"]))


def _row(path: Path, row: Mapping[str, Any], rows: list[str]) -> PublishedRow:
    """{"model": …, "metric": …, "fid": …} taken apart into the row's keys and its figures."""
    place = f"{path}: published: {dict(row)}"
    fp32 = row.get("fp32", False)
    needed = [key for key in rows if not (fp32 and idle_key(key))]
    if lacking := [key for key in needed if key not in row]:
        raise ConfigError(f"{place}: {lacking[0]} is missing, a key of the rows")
    figures = {key: value for key, value in row.items() if key not in (*needed, "fp32")}
    for key, value in figures.items():
        if key not in VALUES:
            raise ConfigError(f"{place}: {key} is no key of the rows and no value; {nearest(key, VALUES)}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{place}: {key}={value}: expected a number")
    settings = {key: row[key] for key in needed}
    return PublishedRow(settings, fp32, {key: float(value) for key, value in figures.items()})
