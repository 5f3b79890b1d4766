"""`CalibrationSet`: what it refuses, and that a file gives back what was saved."""

import numpy as np
import pytest

from ptq_exp.calibration import CalibrationSet
from ptq_exp.errors import DataError


def make(n=7, **extra):
    x = np.random.default_rng(0).standard_normal((n, 1, 4, 4)).astype(np.float32)
    step = np.arange(n) % 3
    return CalibrationSet(x, step, (100.25 - step).astype(np.float32), 10 * step, **extra)


def test_a_file_gives_back_what_was_saved(tmp_path):
    made = make(200, y=np.arange(200) % 4, null_label=4)
    made.save(tmp_path / "set.npz")
    loaded = CalibrationSet.load(tmp_path / "set.npz")
    assert loaded.null_label == 4 and len(loaded) == 200 and isinstance(loaded.x, np.memmap)
    for name in ("x", "step", "t", "y", "evaluations"):
        before, after = getattr(made, name), getattr(loaded, name)
        assert before.dtype == after.dtype and np.array_equal(before, after)


def test_a_file_of_something_else_is_named(tmp_path):
    np.savez(tmp_path / "set.npz", arr_0=np.zeros(3))
    with pytest.raises(DataError, match=r"set\.npz is no calibration set: it holds arr_0"):
        CalibrationSet.load(tmp_path / "set.npz")


def test_a_truncated_file_is_named(tmp_path):
    make(200).save(tmp_path / "set.npz")
    whole = (tmp_path / "set.npz").read_bytes()
    (tmp_path / "set.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"set\.npz is no readable"):
        CalibrationSet.load(tmp_path / "set.npz")


def test_views_are_saved_whole(tmp_path):
    made = make(8)
    x = made.x[::2].swapaxes(2, 3)
    CalibrationSet(x, made.step[::2], made.t[::2], made.evaluations[::2]).save(tmp_path / "set.npz")
    assert np.array_equal(CalibrationSet.load(tmp_path / "set.npz").x, x)


@pytest.mark.parametrize("batch_size, sizes", [(1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (64, [7])])
def test_batches_hold_every_sample_once_with_its_time(batch_size, sizes):
    made = make()
    batches = list(made.batches(batch_size))
    assert [len(x) for x, *_ in batches] == [len(t) for _, t, _ in batches] == sizes
    assert np.array_equal(np.concatenate([x for x, *_ in batches]), made.x)
    assert np.array_equal(np.concatenate([t for _, t, _ in batches]), made.t)
    assert all(y is None for *_, y in batches)


def test_with_guidance_every_state_is_seen_with_its_label_and_without():
    made = make(y=np.arange(7), null_label=9)
    x, t, y = (np.concatenate(parts) for parts in zip(*made.batches(3), strict=True))
    for i in range(7):
        seen = {int(label) for state, label in zip(x, y, strict=True) if np.array_equal(state, made.x[i])}
        assert seen == {i, 9}
    assert len(x) == len(t) == 14


def test_an_empty_set_names_the_setting():
    with pytest.raises(DataError, match=r"calibration\.n_samples must be at least 1"):
        make(0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_states_that_are_no_numbers_are_refused(bad):
    x = make().x.copy()
    x[3, 0, 1, 2] = bad
    with pytest.raises(DataError, match=r"NaN or infinity: check model\.checkpoint"):
        CalibrationSet(x, make().step, make().t, make().evaluations)


def test_states_steps_and_times_must_pair_up():
    made = make()
    with pytest.raises(DataError, match="7 x, 6 step, 7 t, 7 evaluations"):
        CalibrationSet(made.x, made.step[1:], made.t, made.evaluations)
