"""results.json, rewritten whole after every stage, and samples.npz in the layout of the ADM evaluator."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ptq_exp.errors import DataError, InfeasibleError, PTQError, interruption
from ptq_exp.files import atomic_path, write_npz
from ptq_exp.npz import npz_arrays, require_arrays

INTERRUPTED = "interrupted"
"""Status of a run that a signal ended."""
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def to_plain(value: Any, where: str = "value") -> Any:
    """Nested settings or metrics as what JSON can hold: dict, list, str, int, float, bool, None.

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
        return float(value) if math.isfinite(value) else _non_finite_name(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        if bad := [key for key in value if not isinstance(key, str)]:
            raise PTQError(f"{where} has the key {bad[0]!r}, expected only strings as keys")
        return {str(key): to_plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, set | frozenset):
        value = sorted(value)
    elif hasattr(value, "tolist"):  # numpy arrays and scalars, torch tensors
        return to_plain(value.tolist(), where)
    if isinstance(value, list | tuple):
        return [to_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise PTQError(f"{where} is a {type(value).__name__}, which cannot be written as JSON")


def _non_finite_name(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `to_plain(value)` as indented, standard JSON, atomically.

    Raises:
        PTQError: a value has no plain form, or the file cannot be written; the message names `path`.
    """
    text = json.dumps(to_plain(value, Path(path).name), indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike) -> Any:
    """Read what `write_json` wrote, NaN and infinity included.

    Raises:
        DataError: the file is missing or holds no JSON.
    """
    try:
        return restore(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is no readable JSON file: {error}") from error


def restore(value: Any) -> Any:
    """`value` with the strings "NaN", "Infinity" and "-Infinity" turned back into floats, at any depth."""
    if isinstance(value, dict):
        return {key: restore(item) for key, item in value.items()}
    if isinstance(value, list):
        return [restore(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


class Results:
    """The results of one run, on disk after every stage.

    As a context manager it sets the final status: "finished", or "failed" with the error's text when the
    block raises ("infeasible" for an `InfeasibleError`, "interrupted" for a signal; the error goes on). What is raised
    after `finish` changes the status no more. A run that is killed leaves its last complete stage, status "running".

    Args:
        path: the results.json to write; it is written at once, with status "running".
        values: first entries, such as name=, seed=, config=.

    Raises:
        PTQError: the file cannot be written, or a value has no JSON form.
    """

    def __init__(self, path: str | os.PathLike, **values: Any) -> None:
        self.path = Path(path)
        self.values: dict[str, Any] = {"status": "running", "stage": "start"}
        self.update("start", **values)

    def update(self, stage: str, **values: Any) -> None:
        """Merge `values` (dicts key by key, all else replaced), name the stage reached, rewrite the file."""
        plain = to_plain(values, self.path.name)
        _merge(self.values, plain)
        self.values["stage"] = stage
        write_json(self.path, self.values)

    def finish(self, **values: Any) -> None:
        """Last update: status "finished"."""
        self.update("done", **values, status="finished")

    def fail(self, error: BaseException | str) -> None:
        """Last update: the status of `error` and its text; the stage stays the last one reached."""
        text = error if isinstance(error, str) else str(error) or type(error).__name__
        kind = "" if isinstance(error, str) else type(error).__name__
        status = "infeasible" if isinstance(error, InfeasibleError) else "failed"
        if isinstance(error, BaseException) and (signalled := interruption(error)):
            status, text = INTERRUPTED, signalled
        self.update(self.values["stage"], status=status, error=text, error_type=kind)

    def __enter__(self) -> Results:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        if self.values["status"] != "running":
            return
        if error is not None:
            self.fail(error)
        else:
            self.finish()


def _merge(target: dict[str, Any], update: Mapping[str, Any]) -> None:
    for key, value in update.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = value


def write_samples(path: str | os.PathLike, images: np.ndarray, labels: np.ndarray | None = None) -> None:
    """Write generated images as the ADM evaluator reads them: arr_0 uint8 [N, H, W, C], arr_1 labels [N].

    Raises:
        DataError: images are not uint8 [N, H, W, C], or there is not one integer label per image.
        PTQError: the file cannot be written.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4:
        raise DataError(f"samples must be uint8 [N, H, W, C], found {images.dtype} of shape {images.shape}")
    arrays = {"arr_0": images}
    if labels is not None:
        labels = np.asarray(labels)
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            found = f"{labels.dtype} of shape {labels.shape}"
            raise DataError(f"expected one integer label for each of {len(images)} images, found {found}")
        arrays["arr_1"] = labels.astype(np.int64)
    write_npz(path, **arrays)


def read_samples(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray | None]:
    """Images uint8 [N, H, W, C] (memory-mapped where the file allows) and labels [N] or None of a samples.npz.

    Raises:
        DataError: the file is missing, truncated, or holds no arr_0.
    """
    arrays = npz_arrays(path)
    if "arr_0" not in arrays:
        raise DataError(f"{path} is no readable samples file: it holds {', '.join(arrays) or 'nothing'}, but no arr_0")
    require_arrays(path, arrays, {"arr_0": ("u", 4)} | ({"arr_1": ("iu", 1)} if "arr_1" in arrays else {}))
    return arrays["arr_0"], arrays.get("arr_1")
