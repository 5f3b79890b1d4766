"""Settings files of a diffusers folder: read as JSON, and held against the types that their class declares."""

from __future__ import annotations

import inspect
import json
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ptq_exp.errors import CheckpointError, PTQError

_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "list": "a list",
          "NoneType": "null"}
_LISTS = ("list", "tuple", "ndarray")


@dataclass(frozen=True)
class Settings:
    """The JSON object in `root/file`.

    Attributes:
        root: the folder that the user gave.
        file: the file's path below it.
        values: what the file holds.
        error_type: of what its settings are refused with.
    """

    root: Path
    file: str
    values: Mapping[str, Any]
    error_type: type[PTQError] = CheckpointError

    @classmethod
    def read(cls, root: Path, file: str, error_type: type[PTQError] = CheckpointError) -> Settings:
        """Read `root/file`; see `read_json`."""
        return cls(root, file, read_json(root / file), error_type)

    def error(self, text: str) -> PTQError:
        """One line about a setting of this file."""
        return self.error_type(f"model.checkpoint={self.root}: {self.file}: {text}")

    def of(self, cls: type) -> dict[str, Any]:
        """All arguments of the class of `diffusers` with their meaning: the file's value, or the default of `cls`.

        Raises:
            PTQError: a value is of another type than `cls` declares, or is not finite.
        """
        defaults = self.parameters(cls)
        hints = get_type_hints(cls.__init__)
        # what diffusers marks so is taken from the class, whatever the file says
        left = self.values.get("_use_default_values")
        given = {key: value for key, value in self.values.items()
                 if key in defaults and not (isinstance(left, list) and key in left)}
        for key, value in given.items():
            kinds = _kinds(hints.get(key, Any)) | {type(defaults[key]).__name__}
            if key == "sample_size":  # height and width, whatever the class declares
                kinds.add("list")
            if key in hints and not _fits(value, kinds, defaults[key]):
                raise self.error(f"{key}={json.dumps(value)}: {cls.__name__} takes {_words(kinds)}")
        return defaults | given

    @staticmethod
    def parameters(kind: type) -> dict[str, Any]:
        """Return the arguments of a class of `diffusers` and their defaults."""
        return {key: p.default for key, p in inspect.signature(kind.__init__).parameters.items()
                if key != "self" and p.kind is not p.VAR_KEYWORD}

    def require(self, key: str, value: Any, fits: Callable[[Any], bool], wanted: str) -> Any:
        """`value` of the setting `key` if it `fits`; else a line that says what is `wanted`."""
        if not fits(value):
            raise self.error(f"{key}={json.dumps(value)}: {wanted}")
        return value


def read_json(path: Path) -> dict:
    """Read a settings file of a folder.

    Raises:
        CheckpointError: it is missing or not a JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"model.checkpoint={path.parent}: not a diffusers folder: no {path.name} in it"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"model.checkpoint={path.parent}: {path.name} is not readable JSON ({error})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"model.checkpoint={path.parent}: {path.name} is not a JSON object")
    return found


def whole(value: Any, low: int = 1) -> bool:
    """Whether `value` is a whole number of at least `low`; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _kinds(hint: Any) -> set[str]:
    """Names of the types that an annotation allows: of `list[int] | None`, {list, in int, NoneType}."""
    if get_origin(hint) in (Union, types.UnionType):
        return set().union(*map(_kinds, get_args(hint)))
    if get_origin(hint) is Literal:
        return {type(choice).__name__ for choice in get_args(hint)}
    if get_origin(hint) in (list, tuple):
        inner = set().union(*(_kinds(part) for part in get_args(hint) if part is not Ellipsis))
        return {"list", *(kind if kind.startswith("in ") else f"in {kind}" for kind in inner - {"list"})}
    name = getattr(hint, "__name__", str(hint))
    return {"list" if name in _LISTS else name}


def _fits(value: Any, kinds: set[str], default: Any) -> bool:
    """Whether a JSON value is of one of the kinds."""
    if value is None:
        return "NoneType" in kinds
    if isinstance(value, bool):
        return "bool" in kinds
    if isinstance(value, str):
        return "str" in kinds
    if isinstance(value, (int, float)):
        # Python reads NaN and Infinity from JSON
        if not math.isfinite(value):
            return isinstance(default, float) and not math.isfinite(default)
        return "float" in kinds or ("int" in kinds and float(value).is_integer())
    if isinstance(value, list) and ({"list", "tuple"} & kinds):
        inner = {kind.removeprefix("in ") for kind in kinds if kind.startswith("in ")}
        return not inner or all(_fits(item, inner, None) for item in value if not isinstance(item, list))
    return False


def _words(kinds: set[str]) -> str:
    """Return `a whole number or null`."""
    words = [_WORDS[kind] for kind in sorted(kinds) if kind in _WORDS]
    inner = [_WORDS[kind[3:]] for kind in sorted(kinds) if kind.startswith("in ") and kind[3:] in _WORDS]
    if "a list" in words and inner:
        words[words.index("a list")] = f"a list of {inner[0].removeprefix('a ')}s"
    return " or ".join(words) or "another type"
