"""`CalibrationSet`: what it refuses, and that a file gives back what was saved."""

import pytest
import torch

from ptq_exp.calibration import CalibrationSet
from ptq_exp.errors import DataError


def make(n=7, evaluations=12):
    x = torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    step = torch.arange(n) % 3
    return CalibrationSet(x, step, 100.25 - step.float(), evaluations)


def test_a_file_gives_back_what_was_saved(tmp_path):
    made = make()
    made.save(tmp_path / "set.safetensors")
    loaded = CalibrationSet.load(tmp_path / "set.safetensors")
    assert loaded.evaluations == 12 and len(loaded) == 7
    for name in ("x", "step", "t"):
        before, after = getattr(made, name), getattr(loaded, name)
        assert before.dtype == after.dtype and torch.equal(before, after)


def test_views_are_saved_whole(tmp_path):
    made = make(8)
    view = CalibrationSet(made.x[::2].transpose(2, 3), made.step[::2], made.t[::2], 0)
    view.save(tmp_path / "set.safetensors")
    assert torch.equal(CalibrationSet.load(tmp_path / "set.safetensors").x, made.x[::2].transpose(2, 3))


@pytest.mark.parametrize("batch_size, sizes", [(1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (64, [7])])
def test_batches_hold_every_sample_once_with_its_time(batch_size, sizes):
    made = make()
    batches = list(made.batches(batch_size))
    assert [len(x) for x, _ in batches] == [len(t) for _, t in batches] == sizes
    assert torch.equal(torch.cat([x for x, _ in batches]), made.x)
    assert torch.equal(torch.cat([t for _, t in batches]), made.t)


def test_an_empty_set_names_the_setting():
    with pytest.raises(DataError, match=r"calibration\.n_samples must be at least 1"):
        make(0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_states_that_are_no_numbers_are_refused(bad):
    x = make().x.clone()
    x[3, 0, 1, 2] = bad
    with pytest.raises(DataError, match=r"NaN or infinity: check model\.checkpoint"):
        CalibrationSet(x, make().step, make().t, 0)


def test_states_steps_and_times_must_pair_up():
    made = make()
    with pytest.raises(DataError, match="7 states, 6 steps, 7 times"):
        CalibrationSet(made.x, made.step[1:], made.t, 0)
