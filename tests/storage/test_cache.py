"""Entries are found by what made them, and never trusted when damaged."""

import hashlib
import json
import logging
import math
import time

import numpy as np
import pytest

from ptq_exp.errors import ConfigError, DataError, PTQError
from ptq_exp.storage.atomic import file_digest
from ptq_exp.storage.cache import ArtifactCache, digest

SPEC = {"strategy": "ndtc", "samples": 8, "bits": (8, 8), "nested": {"b": None, "a": 0.4}}


class Counter:
    """A maker that counts its calls."""

    def __init__(self, value=1.5):
        self.calls, self.value = 0, value

    def __call__(self):
        self.calls += 1
        return np.full(100, self.value)


def fetch(cache, make, spec=SPEC):
    return cache.get_or_make("calibration", spec, make=make, save=save, load=np.load, suffix=".npy")


def save(value, path):
    np.save(path, value)


def entry_files(root):
    """Files of the entries; locks lie beside them."""
    return sorted(path for path in root.rglob("*") if path.is_file() and ".locks" not in path.parts)


def test_the_second_call_reuses_what_the_first_made(tmp_path, caplog):
    make = Counter()
    first, reused = fetch(ArtifactCache(tmp_path), make)
    assert not reused
    with caplog.at_level(logging.INFO):
        second, reused = fetch(ArtifactCache(tmp_path), make)
    assert reused and make.calls == 1 and np.array_equal(first, second)
    assert "reusing calibration" in caplog.text
    artefact, record = entry_files(tmp_path)
    assert artefact.parent == tmp_path / "calibration" / digest("calibration", SPEC)
    assert json.loads(record.read_text())["spec"] == {**SPEC, "bits": [8, 8]}


def test_every_setting_and_the_kind_decide_the_key():
    keys = {digest("calibration", SPEC), digest("samples", SPEC)}
    changes = ({"samples": 9}, {"samples": 8.0}, {"samples": "8"}, {"extra": None}, {"nested": {"a": 0.4}})
    for change in changes:
        keys.add(digest("calibration", SPEC | change))
    assert len(keys) == 7


def test_the_key_ignores_order_and_is_stable():
    reordered = {key: SPEC[key] for key in reversed(SPEC)} | {"bits": [8, 8], "samples": np.int64(8)}
    assert digest("calibration", reordered) == digest("calibration", SPEC)
    assert digest("k", {"a": 1}) == hashlib.sha256(b'["k",{"a":1}]').hexdigest()


@pytest.mark.parametrize("damage", ["truncate", "flip", "no_record", "half_record", "no_artefact"])
def test_a_damaged_entry_is_logged_and_built_again(tmp_path, damage, caplog):
    make, cache = Counter(), ArtifactCache(tmp_path)
    fetch(cache, make)
    artefact, record = entry_files(tmp_path)
    content = artefact.read_bytes()
    if damage == "truncate":
        artefact.write_bytes(content[:-1])
    elif damage == "flip":
        artefact.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "no_record":
        record.unlink()
    elif damage == "half_record":
        record.write_text(record.read_text()[:20])
    else:
        artefact.unlink()
    value, reused = fetch(cache, make)
    assert not reused and make.calls == 2 and (value == 1.5).all()
    assert "damaged" in caplog.text
    assert fetch(cache, make)[1] and make.calls == 2
    assert len(entry_files(tmp_path)) == 2


def test_off_neither_reads_nor_writes(tmp_path):
    fetch(ArtifactCache(tmp_path), Counter(1.0))
    before = entry_files(tmp_path)
    value, reused = fetch(ArtifactCache(tmp_path, "off"), Counter(2.0))
    assert not reused and (value == 2).all() and entry_files(tmp_path) == before
    fetch(ArtifactCache(tmp_path / "other", "off"), Counter())
    assert not (tmp_path / "other").exists()


def test_refresh_replaces(tmp_path):
    fetch(ArtifactCache(tmp_path), Counter(1.0))
    value, reused = fetch(ArtifactCache(tmp_path, "refresh"), Counter(2.0))
    assert not reused and (value == 2).all()
    value, reused = fetch(ArtifactCache(tmp_path), Counter(3.0))
    assert reused and (value == 2).all()


def test_a_maker_or_a_writer_that_fails_leaves_nothing(tmp_path):
    cache = ArtifactCache(tmp_path)

    def broken(*_):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        fetch(cache, broken)
    with pytest.raises(RuntimeError):
        cache.get_or_make("calibration", SPEC, make=Counter(), save=broken, load=np.load)
    assert entry_files(tmp_path) == [] and list((tmp_path / "calibration").iterdir()) == []


def test_a_whole_entry_that_cannot_be_loaded_says_what_to_do(tmp_path):
    cache = ArtifactCache(tmp_path)

    def save_text(value, path):
        path.write_text("text")

    cache.get_or_make("calibration", SPEC, make=Counter(), save=save_text, load=np.load)
    with pytest.raises(PTQError, match="refresh"):
        cache.get_or_make("calibration", SPEC, make=Counter(), save=save, load=np.load)


def test_an_unwritable_cache_names_the_entry(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PTQError, match="cannot write the cache entry"):
        fetch(ArtifactCache(tmp_path / "file"), Counter())


def test_refresh_replaces_once_for_all_jobs_of_a_sweep(tmp_path):
    fetch(ArtifactCache(tmp_path), Counter(1.0))
    start, make = time.time(), Counter(2.0)
    jobs = [ArtifactCache(tmp_path, "refresh", start) for _ in range(3)]
    assert [fetch(job, make)[1] for job in jobs] == [False, True, True] and make.calls == 1
    assert fetch(ArtifactCache(tmp_path, "refresh"), Counter(3.0))[0][0] == 3


@pytest.mark.parametrize("mode", ["on", "off"])
def test_what_an_entry_took_is_known_to_those_who_reuse_it(tmp_path, monkeypatch, mode):
    now = [10.0]
    monkeypatch.setattr("ptq_exp.storage.cache.time.perf_counter", lambda: now[0])

    def made_in(seconds):
        now[0] += seconds
        return np.ones(3)

    first, second = ArtifactCache(tmp_path, mode), ArtifactCache(tmp_path, mode)
    fetch(first, lambda: made_in(2.5)), fetch(second, lambda: made_in(1.0))
    assert first.seconds == {"calibration": 2.5}
    assert second.seconds == {"calibration": {"on": 2.5, "off": 1.0}[mode]}


def test_an_entry_that_does_not_say_what_it_took_makes_the_sum_unknown(tmp_path):
    fetch(ArtifactCache(tmp_path), Counter())
    (record,) = tmp_path.glob("*/*/entry.json")
    values = json.loads(record.read_text())
    del values["seconds"]
    record.write_text(json.dumps(values))
    cache = ArtifactCache(tmp_path)
    fetch(cache, Counter()), fetch(cache, Counter(), {"other": 1})
    assert math.isnan(cache.seconds["calibration"])


def test_hits_and_misses_are_counted_by_kind(tmp_path):
    cache = ArtifactCache(tmp_path)
    for _ in range(3):
        fetch(cache, Counter())
    cache.get_or_make("ranges", {}, make=Counter(), save=save, load=np.load, suffix=".npy")
    kinds = {"calibration": {"hits": 2, "misses": 1}, "ranges": {"hits": 0, "misses": 1}}
    assert cache.counts() == {"hits": 2, "misses": 2, "kinds": kinds}
    switched_off = ArtifactCache(tmp_path, "off")
    fetch(switched_off, Counter())
    assert switched_off.counts() == {"hits": 0, "misses": 1, "kinds": {"calibration": {"hits": 0, "misses": 1}}}


def test_file_digest_and_wrong_modes(tmp_path):
    path = tmp_path / "model"
    path.write_bytes(b"abc" * 500_000)
    assert file_digest(path) == hashlib.sha256(b"abc" * 500_000).hexdigest()
    with pytest.raises(DataError, match="missing"):
        file_digest(tmp_path / "missing")
    with pytest.raises(ConfigError, match="on, off, refresh"):
        ArtifactCache(tmp_path, "ON")
