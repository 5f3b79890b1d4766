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
    tokens = np.random.default_rng(1).standard_normal((200, 2, 3)).astype(np.float32)
    conditions = {"y": np.arange(200) % 4, "encoder_hidden_states": tokens}
    made = make(200, conditions=conditions, unconditional={"y": np.array(4), "encoder_hidden_states": tokens[0]})
    made.save(tmp_path / "set.npz")
    loaded = CalibrationSet.load(tmp_path / "set.npz")
    assert len(loaded) == 200 and isinstance(loaded.x, np.memmap)
    for name in ("x", "step", "t", "evaluations"):
        before, after = getattr(made, name), getattr(loaded, name)
        assert before.dtype == after.dtype and np.array_equal(before, after)
    for name in ("conditions", "unconditional"):
        before, after = getattr(made, name), getattr(loaded, name)
        assert before.keys() == after.keys() == conditions.keys()
        assert all(before[key].dtype == after[key].dtype and np.array_equal(before[key], after[key]) for key in before)


def test_a_file_of_the_first_format_is_named(tmp_path):
    np.savez(tmp_path / "set.npz", x=make().x, step=make().step, t=make().t, evaluations=make().step, y=make().step)
    with pytest.raises(DataError, match=r"set\.npz is no calibration set: it holds x, step, t, evaluations, y"):
        CalibrationSet.load(tmp_path / "set.npz")


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
    assert all(call.conditions == {} for call in batches)


def test_with_guidance_every_state_is_seen_with_its_label_and_without():
    made = make(conditions={"y": np.arange(7), "size": np.arange(7.0)}, unconditional={"y": np.array(9)})
    calls = list(made.batches(3))
    x, t = (np.concatenate([call[part] for call in calls]) for part in (0, 1))
    y, sizes = (np.concatenate([call.conditions[name] for call in calls]) for name in ("y", "size"))
    for i in range(7):
        seen = {int(label) for state, label in zip(x, y, strict=True) if np.array_equal(state, made.x[i])}
        assert seen == {i, 9}
        assert {int(size) for state, size in zip(x, sizes, strict=True) if np.array_equal(state, made.x[i])} == {i}
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
    with pytest.raises(DataError, match=r"7 evaluations, 6 condition\.y"):
        make(conditions={"y": np.arange(6)})


@pytest.mark.parametrize("unconditional", [{"z": np.array(9)}, {"y": np.zeros(2)}])
def test_what_stands_for_no_condition_has_its_name_and_shape(unconditional):
    with pytest.raises(DataError, match="belongs to no condition of its shape"):
        make(conditions={"y": np.arange(7)}, unconditional=unconditional)


def test_chosen_states_keep_their_conditions():
    made = make(conditions={"y": np.arange(7)}, unconditional={"y": np.array(9)})
    for rows in (np.array([5, 2]), np.isin(np.arange(7), [2, 5])):
        taken = made.take(rows)
        assert sorted(taken.conditions["y"]) == [2, 5] and taken.unconditional == made.unconditional
        assert np.array_equal(taken.x, made.x[rows])
