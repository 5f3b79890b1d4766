"""`cache ls` counts what is there; `cache prune` removes what it should, and nothing that a live process computes."""

import errno
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from ptq_exp.cli.cache import age_text, size_text
from ptq_exp.cli.main import main
from ptq_exp.errors import PTQError
from ptq_exp.storage.cache import ArtifactCache
from ptq_exp.storage.entries import entries

NOW = time.time()
ARRAY = np.arange(1000.0)  # 8128 bytes as .npy


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def cache(monkeypatch, capsys, root):
    """Run `ptq-exp cache ...` on `root`; returns the lines that it prints."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ptq-exp", "cache", *arguments, f"cache_dir={root}"])
        main()
        return capsys.readouterr().out.splitlines()

    return run


def store(root, kind, number, days=0.0):
    """An entry made by the cache itself, last used `days` ago."""
    spec = {"number": number}
    ArtifactCache(root).get_or_make(
        kind, spec, make=lambda: ARRAY, save=lambda value, path: np.save(path, value), load=np.load, suffix=".npy"
    )
    (entry,) = [e.path for e in entries(root) if e.kind == kind and f'"number": {number}\n' in record(e)]
    for path in (*entry.iterdir(), entry):
        os.utime(path, (NOW - days * 86400,) * 2)
    return entry


def record(entry):
    path = entry.path / "entry.json"
    return path.read_text() if path.exists() else ""


def dead_pid():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def leftover(root, pid, kind="images"):
    """What a killed writer leaves: the folder of an unfinished entry."""
    path = root / kind / f".{'a' * 16}.{pid}-0123abcd.tmp"
    path.mkdir(parents=True)
    (path / "artefact.npz").write_bytes(b"half")
    return path


def part(root, digest="b" * 64):
    path = root / "parts" / digest
    path.mkdir(parents=True)
    (path / "00000000.npz").write_bytes(b"x" * 100)
    return path


def test_ls_shows_kind_size_age_entries_and_totals(cache, root):
    first = store(root, "calibration", 1, days=3)
    store(root, "images", 2)
    leftover(root, dead_pid())
    part(root)
    lines = cache("ls")
    size = sum(path.stat().st_size for path in first.iterdir())
    (line,) = [line for line in lines if first.name[:12] in line]
    assert line.split() == ["calibration", first.name[:12], *size_text(size).split(), "3", "d", "3", "d"]
    totals = {line.split()[0]: line.split() for line in lines[lines.index("") + 2 :]}
    assert {kind: row[1] for kind, row in totals.items()} == {
        "calibration": "1", "images": "2", "parts": "1", "total": "4",
    }
    files = [path for path in root.rglob("*") if path.is_file() and ".locks" not in path.parts]
    whole = sum(path.stat().st_size for path in files)
    assert " ".join(totals["total"][2:4]) == size_text(whole)
    assert any("half-written" in line for line in lines)
    assert len(cache("ls", "--totals")) == 5


def test_an_empty_or_missing_cache_is_no_error(cache, root):
    assert cache("ls") == [f"{root} is empty"]
    assert cache("prune", "--all")[-1].startswith("0 of 0 entries")
    assert not root.exists()


def test_prune_without_limits_removes_damaged_and_half_written_alone(cache, root):
    kept, flipped, gutted = (store(root, "calibration", n, days=400) for n in (1, 2, 3))
    artefact = flipped / "artefact.npy"
    artefact.write_bytes(artefact.read_bytes()[:-1] + b"!")
    (gutted / "artefact.npy").unlink()
    half, pieces = leftover(root, dead_pid()), part(root)
    half_file = pieces / f".00000001.{dead_pid()}-0123abcd.tmp.npz"
    half_file.write_bytes(b"half")
    stranger = root / "calibration" / "notes.txt"
    stranger.write_text("mine")
    assert len(cache("prune", "--dry-run")) == 5 and flipped.exists() and half.exists()
    lines = cache("prune")
    assert not any(path.exists() for path in (flipped, gutted, half, half_file))
    assert kept.exists() and pieces.exists() and stranger.exists()
    assert sum(line.startswith("removed ") for line in lines) == 4 and "checksum differs" in "".join(lines)


def test_prune_older_than_goes_by_the_last_use(cache, root):
    old, young = store(root, "images", 1, days=31), store(root, "images", 2, days=29)
    read = store(root, "images", 3, days=31)
    os.utime(read / "artefact.npy", (NOW, NOW - 31 * 86400))  # read since
    cache("prune", "--older-than", "30")
    assert (old.exists(), young.exists(), read.exists()) == (False, True, True)


def test_prune_to_a_size_removes_the_least_recently_used_first(cache, root):
    made = {days: store(root, "images", days, days=days) for days in (5, 1, 9, 3)}
    size = sum(entry.size for entry in entries(root))
    cache("prune", "--max-size", str(size * 0.6 / 1e9))
    assert {days for days, path in made.items() if path.exists()} == {1, 3}
    cache("prune", "--max-size", "0")
    assert entries(root) == []


def test_looking_at_entries_is_no_use_of_them(cache, root):
    store(root, "images", 1, days=31)
    before = entries(root)
    cache("ls", "--verify")
    cache("prune", "--dry-run")
    assert entries(root) == before


def test_all_removes_entries_and_nothing_else(cache, root):
    store(root, "images", 1)
    part(root)
    for name in ("images/readme", "photo.png", "images/short/photo.png"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("mine")
    cache("prune", "--all")
    files = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    left = {path.as_posix() for path in files if path.parts[0] != ".locks"}
    assert left == {"images/readme", "photo.png", "images/short/photo.png"}


READER = """
import sys, numpy as np
array = np.load(sys.argv[1], mmap_mode="r")
print("ready", flush=True)
sys.stdin.readline()
print(array.sum(), flush=True)
"""
HOLDER = """
import sys, time
from pathlib import Path
from ptq_exp.storage.cache import ArtifactCache
with ArtifactCache(sys.argv[1]).alone(sys.argv[2], sys.argv[3]):
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def process():
    """Start a Python process that runs some code, and wait until it is ready."""
    started = []

    def start(code, *arguments):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "ready\n"
        return started[-1]

    yield start
    for child in started:
        child.kill()
        child.wait()


def kill(child):
    child.kill()
    child.wait()


def test_a_process_that_has_mapped_a_removed_entry_reads_on(cache, root, process):
    mapped = store(root, "images", 1)
    child = process(READER, mapped / "artefact.npy")
    cache("prune", "--all")
    assert not mapped.exists()
    child.stdin.write("go\n")
    child.stdin.flush()
    assert float(child.stdout.readline()) == ARRAY.sum()


@pytest.mark.parametrize("place", ["entry", "half-written", "pieces", "half-written piece"])
def test_what_a_live_process_holds_the_lock_of_stays_until_it_is_gone(cache, root, process, place):
    digest = "ab" * 32
    path = {
        "entry": root / "images" / digest / "entry.json", "pieces": root / "parts" / digest / "00000000.npz",
        "half-written": root / "images" / f".{digest[:16]}.{dead_pid()}-0123abcd.tmp" / "artefact.npz",
        "half-written piece": root / "parts" / digest / f".00000001.{dead_pid()}-0123abcd.tmp.npz",
    }[place]
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half")
    other = leftover(root, dead_pid())  # its lock is another one
    child = process(HOLDER, root, "images", digest)
    assert any(line.startswith("kept ") and "holds its lock" in line for line in cache("prune", "--all", "--dry-run"))
    assert any(line.startswith("kept ") and "holds its lock" in line for line in cache("prune", "--all"))
    assert path.exists() and not other.exists()
    kill(child)
    cache("prune", "--all")
    assert not path.exists()


def test_others_go_in_place_of_what_is_held(cache, root, process):
    held, other = store(root, "images", 1, days=9), store(root, "images", 2, days=1)
    child = process(HOLDER, root, "images", held.name)
    size = sum(entry.size for entry in entries(root))
    cache("prune", "--max-size", str(size * 0.6 / 1e9))
    assert held.exists() and not other.exists()
    kill(child)


def test_where_no_lock_can_be_written_only_whole_entries_go(cache, root, monkeypatch):
    whole, half, pieces = store(root, "images", 1), leftover(root, dead_pid()), part(root)

    def read_alone(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("ptq_exp.storage.locks._created", read_alone)
    (root / ".locks" / f"images-{'a' * 32}.lease").mkdir()  # of the process that writes it
    cache("prune", "--all")
    assert (whole.exists(), half.exists(), pieces.exists()) == (False, True, True)


def test_a_cache_that_cannot_be_written_ends_a_run_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PTQError, match="cannot write the cache entry .*/file/.*; choose a cache_dir"):
        store(tmp_path / "file", "images", 1)


@pytest.mark.parametrize(
    "arguments", [["prune", "--older-than", "-1"], ["prune", "--max-size", "nan"], ["prune", "--max-size", "1e999"], []]
)
def test_impossible_arguments(cache, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cache(*arguments)
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


def test_a_file_in_place_of_the_cache_is_reported(cache, root):
    root.write_text("")
    with pytest.raises(SystemExit, match="^error: cache_dir=.* is no folder"):
        cache("ls")


def test_sizes_and_ages():
    sizes = [size_text(size) for size in (0, 999, 1000, 1234567, 5e9, 5e12)]
    assert sizes == ["0 B", "999 B", "1.0 kB", "1.2 MB", "5.0 GB", "5000.0 GB"]
    ages = [age_text(age) for age in (-1, 59, 60, 3600, 47 * 3600, 72 * 3600)]
    assert ages == ["0 s", "59 s", "1 min", "1 h", "47 h", "3 d"]
