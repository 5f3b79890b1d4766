"""A write that fails, or is killed, leaves the old file and nothing else."""

import errno
import os
import resource
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest

from ptq_exp.errors import PTQError
from ptq_exp.storage.atomic import atomic_path, replacing_folder, share_file, write_npz


@contextmanager
def small_file_limit():
    """No file of this process may grow beyond 4 KiB: a real write error in the middle of a file.

    Not a fixture: pytest would write its own log under the limit, and stop if that is a file.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_new_file_replaces_the_old_one_and_makes_its_folder(tmp_path):
    path = tmp_path / "a" / "b" / "x.txt"
    for text in ("one", "two"):
        with atomic_path(path) as temporary:
            assert temporary.parent == path.parent and temporary.suffix == ".txt"
            temporary.write_text(text)
        assert path.read_text() == text
    assert [entry.name for entry in path.parent.iterdir()] == ["x.txt"]


def test_an_exception_keeps_the_old_file_and_leaves_no_trace(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.txt"]


def test_a_disk_that_takes_no_more_is_an_error_that_names_the_path(tmp_path):
    path = tmp_path / "samples.npz"
    path.write_text("old")
    with pytest.raises(PTQError, match="cannot write .*samples.npz: File too large"), small_file_limit():
        write_npz(path, a=np.zeros(10_000))
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["samples.npz"]


def test_a_disk_that_is_full_only_when_flushed_is_noticed(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PTQError, match="cannot write .*x.npz: No space left on device"):
        write_npz(tmp_path / "x.npz", a=np.zeros(3))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_is_an_error_that_names_the_path(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PTQError, match="cannot write .*file/x.npz"):
        write_npz(tmp_path / "file" / "x.npz", a=np.zeros(3))


def test_a_killed_process_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    code = (
        "import os, sys\n"
        "from ptq_exp.storage.atomic import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half'); os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 9
    assert path.read_text() == "old"


def test_npz_holds_the_arrays_and_refuses_objects(tmp_path):
    write_npz(tmp_path / "x.npz", a=np.arange(1000), name=np.array("text"))
    with np.load(tmp_path / "x.npz", allow_pickle=False) as archive:
        assert archive["a"].tolist() == list(range(1000)) and str(archive["name"]) == "text"
    with pytest.raises(PTQError, match="'a' holds Python objects"):
        write_npz(tmp_path / "x.npz", a=np.array([object()]))


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    out = tmp_path / "new" / "out"
    for name in ("first", "second"):
        with replacing_folder(out) as folder:
            (folder / name).mkdir()
            (folder / name / "file").write_text(name)
    assert [path.relative_to(out).as_posix() for path in out.rglob("*")] == ["second", "second/file"]
    with pytest.raises(ZeroDivisionError), replacing_folder(out) as folder:
        (folder / "third").write_text(str(1 / 0))
    assert (out / "second" / "file").read_text() == "second" and list(out.parent.iterdir()) == [out]
    with (
        pytest.raises(PTQError, match="^cannot write out=.*; free space there"),
        replacing_folder(out / "second" / "file" / "out"),
    ):
        pass


@pytest.mark.parametrize("links", [True, False])
def test_a_file_with_two_names_is_one_where_file_systems_allow_it(tmp_path, monkeypatch, links):
    if not links:
        def refuse(*_):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

        monkeypatch.setattr(os, "link", refuse)
    one, other = tmp_path / "one.txt", tmp_path / "folder" / "other.txt"
    one.write_text("content")
    for _ in range(2):  # the second time they are one already
        share_file(one, other)
        assert other.read_text() == "content" and one.samefile(other) == links
    with atomic_path(other) as temporary:
        temporary.write_text("replaced")
    assert one.read_text() == "content"
    share_file(one, other)
    one.unlink()
    assert other.read_text() == "content"
    assert [path.name for path in other.parent.iterdir()] == ["other.txt"]


def test_what_is_not_there_has_no_second_name(tmp_path):
    with pytest.raises(PTQError, match="cannot write .*other.txt: No such file"):
        share_file(tmp_path / "one.txt", tmp_path / "other.txt")
    assert list(tmp_path.iterdir()) == []
