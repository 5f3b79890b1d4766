"""Convert nested values to standard JSON and back: NaN and infinity included, written whole or not at all."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ptq_exp.errors import DataError, PTQError
from ptq_exp.storage.atomic import atomic_path

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def to_plain(value: Any, where: str = "value") -> Any:
    """Convert nested settings or metrics to what JSON can hold: dict, list, str, int, float, bool, None.

    numpy and torch scalars and arrays, paths, enums, dataclasses, tuples and sets (sorted) are converted.
    JSON has no NaN or infinity: they become the strings "NaN", "Infinity", "-Infinity", which `read_json`
    turns back into floats.

    Raises:
        PTQError: a key is not a string, or a value has no plain form; the message names its place.
    """
    if isinstance(value, enum.Enum):
        return to_plain(value.value, where)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else json.dumps(float(value))  # NaN, Infinity, -Infinity
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        if bad := [key for key in value if not isinstance(key, str)]:
            raise PTQError(f"{where} has the key {bad[0]!r}, expected only strings as keys")
        return {str(key): to_plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, set | frozenset):
        members: Any = value
        value = sorted(members)
    elif to_list := getattr(value, "tolist", None):  # numpy arrays and scalars, torch tensors
        return to_plain(to_list(), where)
    if isinstance(value, list | tuple):
        return [to_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise PTQError(f"{where} is a {type(value).__name__}, which cannot be written as JSON")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `to_plain(value)` as indented, standard JSON, atomically.

    Raises:
        PTQError: a value has no plain form, or the file cannot be written; the message names `path`.
    """
    dump_indented(path, to_plain(value, Path(path).name), ensure_ascii=False)


def dump_indented(path: str | os.PathLike[str], plain: Any, *, ensure_ascii: bool = True) -> None:
    """Write plain values as indented JSON, atomically and piece by piece: millions of ranges take their room once.

    Raises:
        PTQError: the file cannot be written.
        ValueError: a number is NaN or infinite.
    """
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        stream.writelines(indented(plain, ensure_ascii=ensure_ascii))
        stream.write("\n")


def indented(plain: Any, *, ensure_ascii: bool = True) -> Iterator[str]:
    """Yield the pieces of plain values as indented JSON; a list without dictionaries in it stays on one line.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    yield from _pieces(plain, json.JSONEncoder(ensure_ascii=ensure_ascii, allow_nan=False).encode, "\n")


def _pieces(plain: Any, encode: Callable[[Any], str], margin: str) -> Iterator[str]:
    """Yield the pieces of a value whose last bracket stands behind `margin`: a line break and spaces."""
    if not isinstance(plain, dict) or not plain:
        text = encode(plain)
        if not isinstance(plain, list) or "{" not in text:
            yield text
            return
    inside = f"{margin}  "
    if isinstance(plain, dict):
        (first, last), parts = "{}", ((f"{_name(key, encode)}: ", value) for key, value in plain.items())
    else:
        (first, last), parts = "[]", (("", value) for value in plain)
    for n, (name, value) in enumerate(parts):
        yield f"{',' if n else first}{inside}{name}"
        yield from _pieces(value, encode, inside)
    yield f"{margin}{last}"


def _name(key: Any, encode: Callable[[Any], str]) -> str:
    """Return a key of a dictionary as JSON has it: a number, True or None is the text of it."""
    return encode(key) if isinstance(key, str) else encode({key: 0})[1:].rpartition(":")[0]


def compact(plain: Any) -> Iterator[str]:
    """Yield the pieces of plain values as JSON without spaces, keys in order: the same for the same values."""
    encode = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode

    def pieces(value: Any) -> Iterator[str]:
        if not isinstance(value, dict) or not value:
            yield encode(value)
            return
        for n, key in enumerate(sorted(value)):
            yield f"{',' if n else '{'}{_name(key, encode)}:"
            yield from pieces(value[key])
        yield "}"

    return pieces(plain)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read what `write_json` wrote, NaN and infinity included.

    Raises:
        DataError: the file is missing or holds no JSON.
    """
    try:
        return restore(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is no readable JSON file: {error}") from error


def restore(value: Any) -> Any:
    """Turn the strings "NaN", "Infinity" and "-Infinity" in `value` back into floats, at any depth."""
    if isinstance(value, dict):
        return {key: restore(item) for key, item in value.items()}
    if isinstance(value, list):
        return [restore(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten {"a": {"b": 1}} to {"a.b": 1}; an empty mapping disappears."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
