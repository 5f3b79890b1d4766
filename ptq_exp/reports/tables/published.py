"""Figures that others have published, to stand beside ours in a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptq_exp.reports.tables.columns import IDLE_GROUPS


@dataclass(frozen=True)
class PublishedRow:
    """The figures of one row: its settings by key, whether it is the full-precision model, and {value name: number}."""

    settings: Mapping[str, Any]
    fp32: bool
    figures: Mapping[str, float]

    def key(self, rows: Sequence[str]) -> tuple[Any, ...]:
        """Its choices for the keys `rows`; what has no effect in full precision is missing there."""
        return tuple(None if self.fp32 and idle_key(key) else self.settings[key] for key in rows)


@dataclass(frozen=True)
class Published:
    """The figures of one source: a short heading, where exactly they stand, and its rows."""

    heading: str
    source: str
    rows: Sequence[PublishedRow]

    def values(self) -> list[str]:
        """Return the values that there are figures of, in order of appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row.figures))


def published_keys(published: Sequence[Published], key: str) -> list[Any]:
    """Return the choices of `key` in order of appearance; none where they are numbers, which stand by size."""
    rows = [row for entry in published for row in entry.rows]
    choices = list(dict.fromkeys(row.settings[key] for row in rows if key in row.settings))
    return choices if all(isinstance(choice, str) for choice in choices) else []


def idle_key(key: str) -> bool:
    """Whether the configuration key has no effect on the full-precision model."""
    return key == "name" or key.split(".", maxsplit=1)[0] in IDLE_GROUPS
