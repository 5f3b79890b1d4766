"""Artefacts that several runs share, found by the digest of the specification that made them."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from ptq_exp.errors import ConfigError, PTQError
from ptq_exp.storage.atomic import file_digest
from ptq_exp.storage.entries import damage, temporary
from ptq_exp.storage.locks import LEASE_SECONDS, Lease, lock_of, only_one
from ptq_exp.storage.plain_json import read_json, to_plain, write_json

T = TypeVar("T")
MODES = ("on", "off", "refresh")
_log = logging.getLogger(__name__)


def digest(kind: str, spec: Mapping[str, Any]) -> str:
    """Return the SHA-256 (hex) of the canonical JSON of kind and spec: independent of key order, of tuple or list.

    Raises:
        PTQError: a value of spec has no JSON form.
    """
    plain = [kind, to_plain(spec, kind)]
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


class ArtifactCache:
    """Values computed once and reused by every run whose specification is the same.

    An entry is the folder `root/kind/<digest>` with the artefact and `entry.json` (the specification, and the
    checksum of the artefact). It is filled under a temporary name and renamed: nobody sees half of one. Of several
    processes that need the same entry one computes it, the others wait; when that one dies, the next takes over (see
    `ptq_exp.storage.locks`). An entry whose checksum is wrong is logged and built again.

    Args:
        root: folder of the cache, created when the first entry is stored.
        mode: "on" reuses and stores, "off" does neither, "refresh" replaces what is older than `fresh_since`.
        fresh_since: time (seconds since 1970) from which on an entry counts as fresh; None = now. The jobs of a sweep
            share the start of the sweep, so that only the first of them computes anew.
        lease: seconds after which others take over what a machine that has died was computing.

    Attributes:
        hits, misses: per kind, how many entries were reused, and computed.
        seconds: per kind, the wall seconds that these entries took when they were computed; NaN where one does not say.

    Raises:
        ConfigError: an unknown mode.
    """

    def __init__(
        self, root: str | os.PathLike[str], mode: str = "on", fresh_since: float | None = None,
        lease: float = LEASE_SECONDS,
    ) -> None:
        if mode not in MODES:
            raise ConfigError(f"cache mode {mode!r} is unknown, expected one of {', '.join(MODES)}")
        self.root = Path(root)
        self.mode = mode
        self.lease = lease
        self.fresh_since = time.time() if fresh_since is None else fresh_since
        self.hits: Counter[str] = Counter()
        self.misses: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def counts(self) -> dict[str, Any]:
        """{"hits", "misses": totals; "kinds": {kind: {"hits", "misses"}}}."""
        kinds = {kind: {"hits": self.hits[kind], "misses": self.misses[kind]} for kind in self.hits | self.misses}
        return {"hits": self.hits.total(), "misses": self.misses.total(), "kinds": kinds}

    def get_or_make(
        self,
        kind: str,
        spec: Mapping[str, Any],
        *,
        make: Callable[[], T],
        save: Callable[[T, Path], Any],
        load: Callable[[Path], T],
        suffix: str = ".npz",
        pieces: Path | None = None,
    ) -> tuple[T, bool]:
        """Return the artefact of (kind, spec), loaded if it is there and whole, made and stored otherwise.

        Args:
            kind: folder name, such as "calibration".
            spec: every setting that decides the value (seed and `file_digest` of the model included).
            make: computes the value.
            save: save(value, path) writes exactly one file at path; it must lose nothing that `load` needs.
            load: load(path) reads it back.
            suffix: of the file, for writers that look at it.
            pieces: folder in which `make` keeps what a killed run goes on with; removed when the value is there. None
                means that there is none.

        Returns:
            The value, and whether it was reused.

        Raises:
            PTQError: the entry cannot be written, or is whole but cannot be loaded (made by another version).
        """
        if self.mode == "off":
            value, _ = self._made(kind, make)
            _remove(pieces)
            return value, False
        key = digest(kind, spec)
        entry = self.root / kind / key
        with suppress(PTQError):  # optimistic read without the lock; errors are reported under it, below
            if (found := self._reused(kind, entry, load)) is not None:
                _remove(pieces)
                return found[0], True
        made: tuple[T, float] | None = None
        while True:
            with self.alone(kind, key) as lease:
                if (found := self._reused(kind, entry, load, say=True)) is not None:
                    _remove(pieces)
                    return found[0], True
                if lease.waited_for is not None:
                    _log.info("%s: %s ended without it, computing it here", kind, lease.waited_for)
                made = made or self._made(kind, make)
                if not lease.lost():
                    self._store(entry, {"spec": spec, "seconds": made[1]}, made[0], save, suffix)
                    _remove(pieces)
                    return made[0], False
                _log.warning(
                    "%s: this process did not renew its lock for %g s (was it stopped?), and another one has taken it: "
                    "waiting for that one's %s", kind, self.lease, entry,
                )

    def _made(self, kind: str, make: Callable[[], T]) -> tuple[T, float]:
        """Return what `make` computes, and the wall seconds that it took."""
        self.misses[kind] += 1
        started = time.perf_counter()
        value = make()
        seconds = time.perf_counter() - started
        self.seconds[kind] += seconds
        return value, seconds

    @contextmanager
    def alone(self, kind: str, key: str) -> Iterator[Lease]:
        """Keep other processes out of what is computed under this kind and key; see `only_one`.

        Raises:
            PTQError: the cache cannot be written.
        """
        with ExitStack() as held:
            try:
                lease = held.enter_context(only_one(lock_of(self.root, kind, key), kind, self.lease))
            except OSError as error:
                raise PTQError(
                    f"cannot write the cache entry {self.root / kind / key}: {error.strerror or error}; choose a "
                    "cache_dir that can be written, or free space there"
                ) from error
            yield lease

    def has(self, kind: str, spec: Mapping[str, Any]) -> bool:
        """Return whether there is an entry that would be reused, if it is whole."""
        return self.mode == "on" and (self.root / kind / digest(kind, spec) / "entry.json").exists()

    def _reused(self, kind: str, entry: Path, load: Callable[[Path], T], say: bool = False) -> tuple[T] | None:
        """Return the value of an entry that is there, whole and not to be replaced; None if there is none."""
        if not entry.exists():
            return None
        if (problem := damage(entry)) is not None:
            if say and self.mode == "on":
                _log.warning("cache entry %s is damaged (%s): building it again", entry, problem)
            return None
        record = read_json(entry / "entry.json")
        if self.mode == "refresh" and float(record.get("made_at", 0.0)) < self.fresh_since:
            return None
        value = _load(entry / record["artefact"], load)
        self.hits[kind] += 1
        self.seconds[kind] += float(record.get("seconds", math.nan))
        _log.info("reusing %s from %s", kind, entry)
        return (value,)

    def _store(
        self, entry: Path, about: Mapping[str, Any], value: T, save: Callable[[T, Path], Any], suffix: str
    ) -> None:
        """Fill a folder under a temporary name, then rename it to the entry."""
        folder = temporary(entry)
        try:
            folder.mkdir(parents=True)
            artefact = folder / f"artefact{suffix}"
            save(value, artefact)
            record = {
                "artefact": artefact.name, "sha256": file_digest(artefact), "made_at": time.time(), **about
            }
            write_json(folder / "entry.json", record)
            _discard(entry)  # damaged, or to be replaced
            _rename_unless_present(folder, entry)
        except OSError as error:
            raise PTQError(f"cannot write the cache entry {entry}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _rename_unless_present(folder: Path, entry: Path) -> None:
    """Move a complete entry into place; if another process was faster (its lock was lost), its entry means the same."""
    try:
        folder.rename(entry)
    except OSError:
        if not entry.is_dir():
            raise


def _discard(entry: Path) -> None:
    """Remove an entry: rename first, so that nobody sees it half deleted, and only one process deletes it."""
    trash = temporary(entry)
    try:
        entry.rename(trash)
    except FileNotFoundError:
        return
    shutil.rmtree(trash, ignore_errors=True)


def _remove(folder: Path | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _load(artefact: Path, load: Callable[[Path], T]) -> T:
    try:
        return load(artefact)
    except Exception as error:
        raise PTQError(
            f"{artefact} is whole but cannot be loaded ({type(error).__name__}: {error}); "
            "delete it, or run once with the cache mode 'refresh'"
        ) from error
