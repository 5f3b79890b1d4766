"""Pieces on disk: joined in order and cut, made again where damaged, and readable without loading."""

import shutil

import numpy as np
import pytest

from ptq_exp.errors import DataError, PTQError
from ptq_exp.storage.npz import npz_array, npz_arrays
from ptq_exp.storage.pieces import Parts, slices

X = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), dtype=np.uint8)
Y = np.arange(11) * 1.5


def written(folder, starts=(0, 4, 8)):
    parts = Parts(folder, (0, 4, 8), 11, ("x", "y"))
    for start in starts:
        parts.write(start, x=np.resize(X[start : start + 4], (4, 8, 8, 3)), y=np.resize(Y[start : start + 4], 4))
    return parts


def test_pieces_written_in_any_order_join_in_theirs_and_the_last_is_cut(tmp_path):
    parts = written(tmp_path / "parts", (8, 0, 4))
    assert parts.missing() == []
    assert parts.join(tmp_path / "all.npz", labels=np.array([3, 1]), name=np.array("mine"))
    with np.load(tmp_path / "all.npz") as archive:  # numpy's own reader, as the ADM evaluator uses it
        assert np.array_equal(archive["x"], X) and np.array_equal(archive["y"], Y)
        assert archive["labels"].tolist() == [3, 1] and str(archive["name"]) == "mine"
    arrays = npz_arrays(tmp_path / "all.npz")
    assert isinstance(arrays["x"], np.memmap) and np.array_equal(arrays["x"], X)
    shutil.rmtree(tmp_path / "parts")
    assert np.array_equal(arrays["x"], X)


def test_totals_are_added_up_over_the_pieces_and_made_again_with_a_damaged_one(tmp_path):
    parts = Parts(tmp_path / "parts", (0, 4, 8), 11, ("y",), ("t",))
    for start in (8, 0, 4):
        parts.write(start, y=np.zeros(4), t=np.array([[start, 0.5]]))
    parts.path(4).write_bytes(parts.path(4).read_bytes()[:-40])
    assert not parts.join(tmp_path / "all.npz") and parts.missing() == [4]
    parts.write(4, y=np.zeros(4), t=np.array([[100, 0.5]]))
    assert parts.join(tmp_path / "all.npz")
    arrays = npz_arrays(tmp_path / "all.npz")
    assert arrays["t"].tolist() == [[108, 1.5]] and arrays["y"].shape == (11,)


def test_a_missing_piece_is_named_and_nothing_is_joined(tmp_path):
    parts = written(tmp_path / "parts", (0, 8))
    assert parts.missing() == [4]
    assert not parts.join(tmp_path / "all.npz") and not (tmp_path / "all.npz").exists()


@pytest.mark.parametrize("damage", ["cut", "other arrays"])
def test_a_damaged_piece_is_removed_and_missing_afterwards(tmp_path, damage):
    parts = written(tmp_path / "parts")
    if damage == "cut":
        parts.path(4).write_bytes(parts.path(4).read_bytes()[:-40])
    else:
        parts.write(4, z=X)
    assert not parts.join(tmp_path / "all.npz")
    assert parts.missing() == [4] and not (tmp_path / "all.npz").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]


def test_what_cannot_be_written_is_an_error_not_a_missing_piece(tmp_path):
    parts = written(tmp_path / "parts")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PTQError, match="cannot write .*file/all.npz"):
        parts.join(tmp_path / "file" / "all.npz")
    assert parts.missing() == []


def test_a_truncated_file_is_not_mapped(tmp_path):
    written(tmp_path / "parts").join(tmp_path / "all.npz")
    whole = (tmp_path / "all.npz").read_bytes()
    (tmp_path / "all.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="all.npz is no readable"):
        npz_array(tmp_path / "all.npz", "x")


@pytest.mark.parametrize("n, size", [(0, 3), (1, 3), (3, 3), (10, 3)])
def test_slices_cover_every_row_once(n, size):
    rows = list(range(n))
    assert [row for part in slices(n, size) for row in rows[part]] == rows
    assert all(0 < len(rows[part]) <= size for part in slices(n, size))
