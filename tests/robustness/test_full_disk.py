"""A disk that takes no more, or nothing at all: one line that names the folder and the fix; earlier files stay."""

import pytest

from ptq_exp.storage.atomic import file_digest

JOB = ["+experiment=ndtc_w8a8"]


def digests(folder):
    moving = {".locks", "again"}  # the cache's locks, and the run that fails
    files = [path for path in folder.rglob("*") if path.is_file() and not moving & set(path.parts)]
    return {path.relative_to(folder): file_digest(path) for path in files}


@pytest.fixture(scope="module")
def earlier(job, tmp_path_factory):
    """A finished run and its cache, which must stay as they are; other runs may lie beside it."""
    folder = tmp_path_factory.mktemp("earlier")
    ended = job(*JOB, f"hydra.run.dir={folder}/run", f"cache_dir={folder}/cache", small=True)
    assert ended.status == 0, ended.output
    return folder


def test_a_full_disk_in_the_middle_of_a_run(job, earlier, mounted, tmp_path):
    """At several sizes, so that different writers are the first to find no room."""
    before = digests(earlier)
    size = sum(path.stat().st_size for path in (earlier / "run").rglob("*") if path.is_file()) // 1024
    for share in (0.0, 0.02, 0.5, 0.9):
        disk = mounted(max(4, int(share * size)))
        error = job(*JOB, f"hydra.run.dir={disk}/run", f"cache_dir={earlier}/cache", small=True).error
        assert str(disk) in error and "No space left on device" in error and "free space" in error
        left = [path for path in (disk / "run").glob("*.npz")]
        assert not left or share > 0.02
    assert {path: digest for path, digest in digests(earlier).items() if path in before} == before


def test_a_full_cache_disk(job, earlier, mounted):
    disk = mounted(8)
    error = job(*JOB, "seed=1", f"hydra.run.dir={earlier}/again", f"cache_dir={disk}/cache", small=True).error
    assert f"{disk}/cache" in error and "No space left on device" in error and "free space" in error


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_files_that_may_not_grow(job, earlier, share):
    """The same without a disk of its own: the system refuses to let a file grow to the size of the saved network."""
    before = digests(earlier)
    size = (earlier / "run" / "quantized" / "quantized.safetensors").stat().st_size // 1024
    places = f"hydra.run.dir={earlier}/again", f"cache_dir={earlier}/cache"
    ended = job(*JOB, *places, limit_kb=max(1, int(share * size)), small=True)
    assert f"{earlier}/again" in ended.error and "File too large" in ended.error and "free space" in ended.error
    assert {path: digest for path, digest in digests(earlier).items() if path in before} == before


def test_a_read_only_disk(job, earlier, mounted):
    disk = mounted(100)
    mounted(read_only=disk)
    error = job(*JOB, f"hydra.run.dir={disk}/run", f"cache_dir={earlier}/cache", small=True).error
    assert f"{disk}/run" in error and "Read-only file system" in error and "hydra.run.dir" in error
    error = job(*JOB, f"hydra.run.dir={earlier}/again", f"cache_dir={disk}/cache", small=True).error
    assert f"{disk}/cache" in error and "Read-only file system" in error and "choose a cache_dir" in error


def test_folders_that_cannot_be(job, tmp_path):
    (tmp_path / "file").write_text("mine")
    for setting in ("hydra.run.dir", "cache_dir"):
        other = f"{'cache_dir' if setting == 'hydra.run.dir' else 'hydra.run.dir'}={tmp_path}/other"
        for place in (tmp_path / "file" / "x", "/proc/nothing/x"):
            error = job(*JOB, other, f"{setting}={place}", small=True).error
            assert str(place) in error and setting in error
    assert (tmp_path / "file").read_text() == "mine"
