"""Declare one setting: its default, what it is for, and which values it takes."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields
from typing import Any

from ptq_exp.errors import ConfigError

KEY = "setting"
"""Where a dataclass field keeps its `Setting`."""
_LIGHT = "ptq_exp.storage."


@dataclass(frozen=True)
class Setting:
    """What the settings page and the checks know of a setting.

    Attributes:
        meaning: one sentence for docs/settings.md.
        low, high: least and largest value; None = no bound.
        choices: the valid words, or the dotted name of the registry or tuple that holds them (`imports` may add some).
        path: it is a path, or its entries may be: `~` is the home folder.
    """

    meaning: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] | str | None = None
    path: bool = False

    def valid_words(self) -> tuple[str, ...]:
        """Return the words that may be chosen; none where anything of the right type may be given."""
        return tuple(pkgutil.resolve_name(self.choices) if isinstance(self.choices, str) else self.choices or ())

    def check(self, name: str, value: Any) -> None:
        """Raise ConfigError unless `value` of the setting `name` is one of the choices and within the bounds."""
        words = self.valid_words()
        if words and value not in words:
            raise ConfigError(f"{name}={value}: choose one of {', '.join(words)}")
        if (self.low is not None and value < self.low) or (self.high is not None and value > self.high):
            raise ConfigError(f"{name}={value}: choose {self.bounds()}")

    def bounds(self) -> str:
        """Describe the bounds, such as "1 or more" or "0..1"; empty without any."""
        if self.low is None:
            return ""
        return f"{self.low} or more" if self.high is None else f"{self.low}..{self.high}"


def setting(default: Any, meaning: str, **known: Any) -> Any:
    """Declare a dataclass field with its `Setting`; a callable `default`, such as `list`, makes the default."""
    metadata = {KEY: Setting(meaning, **known)}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def settings_of(section: Any) -> Iterator[tuple[str, Setting]]:
    """Yield name and `Setting` of each field of a section (instance or class)."""
    for entry in fields(section):
        if (known := setting_of(entry)) is not None:
            yield entry.name, known


def setting_of(entry: Field[Any]) -> Setting | None:
    """Return what is known of a field: of one of the schema, or of `Policy`, which stands below it and uses a dict."""
    if "meaning" not in entry.metadata:
        return entry.metadata.get(KEY)
    low, high = entry.metadata["bounds"] or (None, None)
    return Setting(entry.metadata["meaning"], low, high, entry.metadata["choices"] or None)


def check_section(name: str, section: Any, *, quick: bool = False) -> None:
    """Raise ConfigError for the first setting of `section` that is no valid word or out of bounds; None is let through.

    Args:
        name: of the section on the command line, such as "sampler"; "" for settings without a section.
        section: an instance of a dataclass of the schema.
        quick: leave out settings whose words are found in a module that takes seconds to import.
    """
    for key, known in settings_of(section):
        if quick and isinstance(known.choices, str) and not known.choices.startswith(_LIGHT):
            continue
        if (value := getattr(section, key)) is not None:
            known.check(f"{name}.{key}" if name else key, value)
