"""The settings of the schema by their dotted names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from functools import cache
from typing import Any, get_type_hints

from ptq_exp.settings.field import setting_of
from ptq_exp.settings.schema import ExperimentConfig


def setting_names() -> list[str]:
    """List every setting of the schema, dotted: "name", "sampler.eta", ..."""
    return list(setting_types())


@cache
def setting_types() -> dict[str, Any]:
    """Map every setting of the schema, dotted, to the type that it is declared with."""
    return {name: hint for name, hint, _ in walk(ExperimentConfig)}


def path_settings() -> list[str]:
    """List the settings that are paths, or whose entries may be: `~` in them is the home folder."""
    return [name for name, _, entry in walk(ExperimentConfig) if (known := setting_of(entry)) and known.path]


def walk(schema: type, prefix: str = "") -> Iterator[tuple[str, Any, Field[Any]]]:
    """Yield name, type and dataclass field of every setting of `schema` and of its sections."""
    hints = get_type_hints(schema)
    for entry in fields(schema):
        hint = hints[entry.name]
        if isinstance(hint, type) and is_dataclass(hint):
            yield from walk(hint, f"{prefix}{entry.name}.")
        else:
            yield f"{prefix}{entry.name}", hint, entry
