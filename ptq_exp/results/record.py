"""results.json, rewritten whole after every stage, and samples.npz in the layout of the ADM evaluator."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ptq_exp.errors import DataError, InfeasibleError, interruption
from ptq_exp.storage.atomic import write_npz
from ptq_exp.storage.npz import npz_arrays, require_arrays
from ptq_exp.storage.plain_json import to_plain, write_json

INTERRUPTED = "interrupted"
"""Status of a run that a signal ended."""
SAMPLES = "samples.npz"
"""The file of a run's images, in its folder."""


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

    def fail(self, error: BaseException) -> None:
        """Last update: the status of `error` and its text; the stage stays the last one reached."""
        status, text = "infeasible" if isinstance(error, InfeasibleError) else "failed", str(error)
        if signalled := interruption(error):
            status, text = INTERRUPTED, signalled
        kind = type(error).__name__
        self.update(self.values["stage"], status=status, error=text or kind, error_type=kind)

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
