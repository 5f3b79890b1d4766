"""Check types that OmegaConf would convert: `attention=2` is no bool, `checkpoint=nan` no path, no number infinite."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

from ptq_exp.errors import ConfigError

_PLAIN = {"int": int, "float": float, "str": str, "bool": bool, "None": type(None)}
LARGEST = 10**9
"""No count, width or rate of an experiment is larger; a mistyped one ends here instead of in a full memory."""
_LARGEST_OF = {"seed": 2**32 - 1}
_NUMBERS_AS_TEXT = ("logger.",)
"""Where a number is as good a name as any."""


def check_types(settings: Mapping[str, Any], schema: type, prefix: str = "") -> None:
    """Raise ConfigError at the first setting whose value has not the type that the dataclass `schema` declares.

    They are looked at in the order of `settings`. Unknown keys, and text in place of numbers, are left to the schema
    itself.
    """
    hints = typing.get_type_hints(schema)
    for key in (key for key in settings if key in hints):
        name, value, hint = f"{prefix}{key}", settings[key], hints[key]
        if not (isinstance(hint, type) and is_dataclass(hint)):
            check_value(name, value, hint)
        elif isinstance(value, Mapping):
            check_types(value, hint, f"{name}.")
        else:
            raise ConfigError(f"{name}={value}: a group of settings: choose an option of it, or {name}.KEY=VALUE")


def check_value(name: str, value: Any, hint: Any) -> None:
    """Raise ConfigError unless `value` is what the type `hint` allows; only plain types are looked at."""
    kinds = set(_kinds(hint))
    if value is None or Any in kinds:
        return
    if kinds == {bool} and not isinstance(value, bool):
        raise ConfigError(f"{name}={value}: choose true or false")
    if bool not in kinds and isinstance(value, bool) and kinds <= {int, float, str}:
        raise ConfigError(f"{name}={value}: expected {_called(kinds)}, not yes or no")
    if kinds <= {int, float}:
        _check_number(name, value)
    elif kinds == {str}:
        _check_text(name, value)
    for kind in kinds:
        if typing.get_origin(kind) in (list, tuple):
            _check_list(name, value, typing.get_args(kind)[0])


def check_argument(name: str, value: Any, annotation: Any) -> None:
    """Check an argument of a constructor as `check_value` does; text is no number there, nor a number text.

    Annotations of other than plain types are passed over.
    """
    words = annotation.split("|") if isinstance(annotation, str) else [getattr(annotation, "__name__", "")]
    found = [_PLAIN.get(word.strip()) for word in words]
    if value is None or None in found:
        return
    kinds = {kind for kind in found if kind is not None and kind is not type(None)}
    check_value(name, value, typing.Union[tuple(kinds)])  # noqa: UP007  made at run time
    if not isinstance(value, tuple(kinds | ({int} if float in kinds else set()))):
        raise ConfigError(f"{name}={value}: expected {_called(kinds)}")


def _kinds(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, without None."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(kind for kind in typing.get_args(hint) if kind is not type(None))
    return (hint,)


def _called(kinds: set[type]) -> str:
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return " or ".join(words[kind] for kind in (int, float, str, bool) if kind in kinds)


def _check_number(name: str, value: Any) -> None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return  # the schema reports it
    except OverflowError:
        number = math.inf
    largest = _LARGEST_OF.get(name, LARGEST)
    if not math.isfinite(number):
        raise ConfigError(f"{name}={value if isinstance(value, float) else '...'}: give a finite number")
    if abs(number) > largest:
        raise ConfigError(f"{name}={value}: too large, choose {largest} or less")


def _check_list(name: str, value: Any, hint: Any) -> None:
    if not isinstance(value, list) or None in value:
        raise ConfigError(f"{name}={value}: give a list, such as {name}=[a,b], without null")
    for item in value:
        if isinstance(item, list | dict) and hint is not Any:
            raise ConfigError(f"{name}={value}: give a plain list, nothing nested")
        check_value(name, item, hint)


def _check_text(name: str, value: Any) -> None:
    if isinstance(value, int) and name.startswith(_NUMBERS_AS_TEXT):
        return
    if isinstance(value, int | float):
        raise ConfigError(f"{name}={value}: expected text; quote it if you mean the word: {name}=\"'{value}'\"")
    if not isinstance(value, str):
        return
    if not value.strip():
        raise ConfigError(f"{name}='{value}': is empty; give text, or null where there is nothing to say")
    if not value.isprintable():
        raise ConfigError(f"{name}={value!r}: holds characters that cannot be shown")
    if name.endswith("name") and "/" in value:
        raise ConfigError(f"{name}={value}: folders are called after it, give a name without /")
