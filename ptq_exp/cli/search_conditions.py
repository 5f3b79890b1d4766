"""Hold the trials of a search to conditions: least values of numbers in their results.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ptq_exp.errors import ConfigError

_ABSENT = object()


def conditions(found: Any) -> dict[str, float]:
    """Return what `require` of a search's file says: {path such as runtime.int8_share: least value}.

    Raises:
        ValueError: it is of another kind, or a least value is no number.
    """
    if not isinstance(found, Mapping):
        raise ValueError(f"require: expected paths in results.json and least values, found {found}")
    for path, least in found.items():
        if not _is_number(least):
            raise ValueError(f"require.{path}={least}: give a number")
    return {str(path): float(least) for path, least in found.items()}


def missed(require: Mapping[str, float], results: Sequence[Mapping[str, Any]]) -> str:
    """Return the first condition that one of the `results` of a trial misses, in words, or ""."""
    for path, least in require.items():
        for result in results:
            value = _at(result, path)
            if value is _ABSENT:
                return f"results.json has no {path}, of which the search requires {least}"
            if value is not None and not (_is_number(value) and value >= least):
                return f"{path} is {value}, the search requires {least}"
    return ""


def check_known(require: Mapping[str, float], finished: Sequence[Mapping[str, Any]]) -> None:
    """Raise ConfigError for a path that none of the `finished` results has; without results nothing is known."""
    for path in require:
        if finished and all(_at(result, path) is _ABSENT for result in finished):
            raise ConfigError(
                f"require: {path}: results.json of no trial has it; docs/outputs.md lists its numbers, those of an "
                "engine are there with runtime=openvino or runtime=torch"
            )


def _at(result: Mapping[str, Any], path: str) -> Any:
    """Return the value at a dotted path, or `_ABSENT`; a section is no value."""
    found: Any = result
    for key in path.split("."):
        found = found.get(key, _ABSENT) if isinstance(found, Mapping) else _ABSENT
    return _ABSENT if isinstance(found, Mapping) else found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
