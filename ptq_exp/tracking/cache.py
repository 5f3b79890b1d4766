"""Artefacts that several runs share, found by the digest of the specification that made them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ptq_exp.errors import ConfigError, DataError, PTQError
from ptq_exp.files import file_digest
from ptq_exp.tracking.results import read_json, to_plain, write_json

T = TypeVar("T")
MODES = ("on", "off", "refresh")
_log = logging.getLogger(__name__)


def digest(kind: str, spec: Mapping[str, Any]) -> str:
    """sha256 (hex) of the canonical JSON of kind and spec: independent of key order, of tuple or list.

    Raises:
        PTQError: a value of spec has no JSON form.
    """
    plain = [kind, to_plain(spec, kind)]
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


class ArtifactCache:
    """Values computed once and reused by every run whose specification is the same.

    An entry is the folder `root/kind/<digest>` with the artefact and `entry.json` (the specification, and the
    checksum of the artefact). It is filled under a temporary name and renamed, so two processes may build the
    same entry at once: one of them is kept. An entry whose checksum is wrong is logged and built again.

    Args:
        root: folder of the cache, created when the first entry is stored.
        mode: "on" reuses and stores, "off" does neither, "refresh" builds anew and replaces.

    Raises:
        ConfigError: an unknown mode.
    """

    def __init__(self, root: str | os.PathLike, mode: str = "on") -> None:
        if mode not in MODES:
            raise ConfigError(f"cache mode {mode!r} is unknown, expected one of {', '.join(MODES)}")
        self.root = Path(root)
        self.mode = mode

    def get_or_make(
        self,
        kind: str,
        spec: Mapping[str, Any],
        *,
        make: Callable[[], T],
        save: Callable[[T, Path], Any],
        load: Callable[[Path], T],
        suffix: str = ".npz",
    ) -> tuple[T, bool]:
        """The artefact of (kind, spec), loaded if it is there and whole, made and stored otherwise.

        Args:
            kind: folder name, such as "calibration".
            spec: every setting that decides the value (seed and `file_digest` of the model included).
            make: computes the value.
            save: save(value, path) writes exactly one file at path; it must lose nothing that `load` needs.
            load: load(path) reads it back.
            suffix: of the file, for writers that look at it.

        Returns:
            The value, and whether it was reused.

        Raises:
            PTQError: the entry cannot be written, or is whole but cannot be loaded (made by another version).
        """
        if self.mode == "off":
            return make(), False
        entry = self.root / kind / digest(kind, spec)
        if self.mode == "on" and entry.exists():
            if (problem := _problem(entry)) is None:
                value = _load(entry, load)
                _log.info("reusing %s from %s", kind, entry)
                return value, True
            _log.warning("cache entry %s is damaged (%s): building it again", entry, problem)
            _discard(entry)
        value = make()
        self._store(entry, spec, value, save, suffix)
        return value, False

    def _store(self, entry: Path, spec: Mapping[str, Any], value: T, save: Callable, suffix: str) -> None:
        """Fill a folder under a temporary name, then rename it to the entry."""
        temporary = _temporary(entry)
        try:
            temporary.mkdir(parents=True)
            artefact = temporary / f"artefact{suffix}"
            save(value, artefact)
            record = {"artefact": artefact.name, "sha256": file_digest(artefact), "spec": spec}
            write_json(temporary / "entry.json", record)
            if self.mode == "refresh":
                _discard(entry)
            _rename_unless_present(temporary, entry)
        except OSError as error:
            raise PTQError(f"cannot write the cache entry {entry}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _temporary(entry: Path) -> Path:
    return entry.with_name(f".{entry.name[:16]}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")


def _rename_unless_present(temporary: Path, entry: Path) -> None:
    """Move a complete entry into place; if another process was faster, its entry has the same meaning."""
    try:
        temporary.rename(entry)
    except OSError:
        if not entry.is_dir():
            raise


def _discard(entry: Path) -> None:
    """Remove an entry: rename first, so that nobody sees it half deleted, and only one process deletes it."""
    trash = _temporary(entry)
    try:
        entry.rename(trash)
    except FileNotFoundError:
        return
    shutil.rmtree(trash, ignore_errors=True)


def _problem(entry: Path) -> str | None:
    """What is wrong with an entry's files, or None."""
    try:
        record = read_json(entry / "entry.json")
        found = file_digest(entry / record["artefact"])
        return None if found == record["sha256"] else "its checksum differs"
    except (DataError, KeyError, TypeError) as error:
        return str(error)


def _load(entry: Path, load: Callable[[Path], T]) -> T:
    artefact = entry / read_json(entry / "entry.json")["artefact"]
    try:
        return load(artefact)
    except Exception as error:
        raise PTQError(
            f"{artefact} is whole but cannot be loaded ({type(error).__name__}: {error}); "
            "delete it, or run once with the cache mode 'refresh'"
        ) from error
