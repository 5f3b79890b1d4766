"""Settings as words in a table, and the order in which they stand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


def label(value: Any, missing: str = "—") -> str:
    """Return a setting as a word: 8, 0.5, true, ndtc."""
    if value is None:
        return missing
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def word(value: Any) -> str:
    """Return a setting as a word that no other value has: floats with all their digits."""
    return str(value) if isinstance(value, float) else label(value)


def letter(specs: Sequence[str], spec: str) -> str:
    """Return (a) for the first of `specs`; a dash for what is none of them."""
    return f"({chr(ord('a') + specs.index(spec))})" if spec in specs else "—"


def condition(item: tuple[str, Sequence[Any]]) -> str:
    """Return a filter as it is typed: bits=w8a8,w4a8."""
    key, allowed = item
    return f"{key}={','.join(map(str, allowed))}"


def natural(value: Any) -> tuple:
    """Sort key of settings of any type: bit-widths from wide to narrow, numbers by size, missing ones last."""
    if value is None:
        return (3,)
    if isinstance(value, bool | int | float):
        return (0, value)
    widths = re.fullmatch(r"w(\d+)a(\d+)", value)
    return (1, *(-int(width) for width in widths.groups())) if widths else (2, value)
