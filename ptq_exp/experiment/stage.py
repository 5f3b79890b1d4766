"""One motion of all stages: find in the cache or compute, go on where a killed run stopped, clean up, say which."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from ptq_exp.storage.atomic import write_npz
from ptq_exp.storage.cache import ArtifactCache, digest
from ptq_exp.storage.npz import npz_arrays

log = logging.getLogger("ptq_exp")

T = TypeVar("T")
Key = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]
Writes = Callable[[Path], object]


@dataclass(frozen=True)
class Record:
    """What a stage found, to be put on disk by the writer of the run.

    Attributes:
        numbers: entries of results.json.
        files: name -> writes the file at a path.
        pictures: the same; a picture that cannot be drawn is a warning.
    """

    numbers: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Writes] = field(default_factory=dict)
    pictures: Mapping[str, Writes] = field(default_factory=dict)


class Made(NamedTuple):
    """What a stage returns: the value that the next ones need, and its record."""

    value: Any
    record: Record


class Writer(Protocol):
    """Puts records on disk."""

    def write(self, stage: str, record: Record, **numbers: Any) -> None:
        """Write what a stage found."""


class Stages:
    """Runs stages one after the other: each is timed, and its record goes to the writer."""

    def __init__(self, cache: ArtifactCache, writer: Writer) -> None:
        self.cache, self.writer = cache, writer

    def __call__(self, name: str, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Return the value that `function` returns, alone or in `Made`."""
        started = time.perf_counter()
        made = function(*args, **named)
        seconds = {name: round(time.perf_counter() - started, 2)}
        value, record = made if isinstance(made, Made) else (made, Record())
        self.writer.write(name, record, seconds=seconds, cache=self.cache.counts())
        return value


def cached(
    cache: ArtifactCache, kind: str, key: Key, make: Callable[[Path], T], what: str, *,
    save: Callable[[T, Path], Any] = lambda arrays, path: write_npz(path, **arrays),
    load: Callable[[Path], T] = npz_arrays, when_reused: Callable[[T], object] = lambda value: None,
    detail: Callable[[T], str] = lambda value: "",
) -> T:
    """Find the artefact of (kind, key) in the cache, or compute it, and say which of the two.

    Args:
        make: computes it; its argument is a folder in which a killed run with the same key finds its pieces again.
        what: the artefact's name in the log.
        save, load: see `ArtifactCache.get_or_make`; arrays by name where nothing else is said.
        when_reused: takes a value that was found, where computing it would have changed something else, too.
        detail: what else the log says of it.

    Raises:
        PTQError: the cache cannot be written, or its entry cannot be read.
    """
    folder = working_folder(cache, kind, key)
    value, reused = cache.get_or_make(kind, key, make=lambda: make(folder), save=save, load=load, pieces=folder)
    if reused:
        when_reused(value)
    log.info("%s: %s%s", what, "reused from the cache" if reused else "computed", detail(value))
    return value


@contextmanager
def resumable(cache: ArtifactCache, kind: str, key: Key) -> Iterator[Path]:
    """Open the `working_folder` for one process at a time; it is removed when the block ends well.

    A process that was stopped, and whose lock another one has taken meanwhile, leaves the folder to that one.
    """
    folder = working_folder(cache, kind, key)
    with cache.alone("parts", folder.name) as lease:
        yield folder
        if not lease.lost():
            shutil.rmtree(folder, ignore_errors=True)


def working_folder(cache: ArtifactCache, kind: str, key: Key) -> Path:
    """Where a killed run finds its pieces again; with cache=off no other process looks there."""
    alone = f"-{os.getpid()}" if cache.mode == "off" else ""
    return cache.root / "parts" / f"{digest(kind, key)}{alone}"
