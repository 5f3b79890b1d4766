"""Entries are found by what made them, never trusted when damaged, and survive two builders at once."""

import hashlib
import json
import logging
import subprocess
import sys

import numpy as np
import pytest

from ptq_exp.errors import ConfigError, DataError, PTQError
from ptq_exp.files import file_digest
from ptq_exp.tracking.cache import ArtifactCache, digest

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
    return sorted(path for path in root.rglob("*") if path.is_file())


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
    assert [path for path in tmp_path.rglob("*") if path.name != "calibration"] == []


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


# Each process says that it is building, and waits for the other: neither finds the entry of the other.
BUILDER = """
import pathlib, sys, time
import numpy as np
from ptq_exp.tracking.cache import ArtifactCache

root, mine, other = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def make():
    (root / mine).touch()
    deadline = time.monotonic() + 60
    while not (root / other).exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    return np.full(1000, float(mine))

value, reused = ArtifactCache(root / "cache").get_or_make(
    "calibration", {"a": 1}, make=make, save=lambda v, p: np.save(p, v), load=np.load, suffix=".npy")
assert not reused and (value == float(mine)).all()
"""


def test_two_processes_may_build_the_same_entry(tmp_path):
    pairs = [("1", "2"), ("2", "1")]
    builders = [subprocess.Popen([sys.executable, "-c", BUILDER, tmp_path, *pair]) for pair in pairs]
    assert [builder.wait(90) for builder in builders] == [0, 0]
    value, reused = fetch(ArtifactCache(tmp_path / "cache"), Counter(3.0), {"a": 1})
    assert reused and len(set(value)) == 1 and value[0] in (1.0, 2.0)
    assert len(entry_files(tmp_path / "cache")) == 2


def test_file_digest_and_wrong_modes(tmp_path):
    path = tmp_path / "model"
    path.write_bytes(b"abc" * 500_000)
    assert file_digest(path) == hashlib.sha256(b"abc" * 500_000).hexdigest()
    with pytest.raises(DataError, match="missing"):
        file_digest(tmp_path / "missing")
    with pytest.raises(ConfigError, match="on, off, refresh"):
        ArtifactCache(tmp_path, "ON")
