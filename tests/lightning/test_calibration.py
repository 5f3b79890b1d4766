"""Collecting a calibration set through Lightning: batches, order, labels and cost."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ptq_exp.calibration import StateRequest, labelled, source
from ptq_exp.diffusion.noise import CALIBRATION
from ptq_exp.errors import ConfigError
from ptq_exp.lightning import CalibrationModule, collect_calibration_set
from ptq_exp.storage.atomic import write_npz

STEPS = torch.tensor([3, 0, 5, 1, 2, 4, 5, 0, 3, 2])


def collect(module, trainer, batch_size, folder):
    states = labelled(STEPS, module.grid)
    return collect_calibration_set(module, trainer, states, batch_size, folder / f"parts{batch_size}")


def test_the_set_does_not_depend_on_the_batch_size(digits, trainer, tmp_path):
    module = CalibrationModule(digits, digits.time_grid(6), "denoise", seed=2)
    whole = collect(module, trainer, 64, tmp_path)
    parts = collect(module, trainer, 3, tmp_path)
    np.testing.assert_allclose(parts.x, whole.x, rtol=0, atol=1e-5)
    for made in (whole, parts):
        assert made.step.tolist() == made.evaluations.tolist() == STEPS.tolist()
        assert np.array_equal(made.t, module.grid.timesteps[STEPS].float())


@pytest.mark.parametrize("name, eta", [("denoise", 0.0), ("denoise", 1.0), ("diffuse", 0.0), ("raw", 0.0)])
def test_the_set_is_what_the_source_gives(toy, trainer, name, eta, tmp_path):
    images = np.arange(3 * 16, dtype=np.uint8).reshape(3, 4, 4, 1)
    grid = toy.time_grid(6, eta=eta)
    module = CalibrationModule(toy, grid, name, seed=2, images=images)
    made = collect(module, trainer, 4, tmp_path)
    request = StateRequest(grid, range(len(STEPS)), STEPS, 2, images=images)
    expected, evaluations = source(name)(toy, request)
    assert np.array_equal(made.x, expected) and np.array_equal(made.evaluations, evaluations)


def test_samples_are_in_the_order_of_their_index_whatever_the_order_of_the_batches(toy, trainer, tmp_path):
    """Devices that share the work write their batches in any order; a killed run leaves some of them."""
    module = CalibrationModule(toy, toy.time_grid(6), "denoise", seed=2)
    order = [1, 7, 3, 4, 9, 0, 8, 5, 2, 6]  # by steps 0 0 1 2 2 3 3 4 5 5
    for start in (8, 0):
        places = torch.arange(start, min(start + 4, len(STEPS)))
        index = torch.tensor(order)[places]
        found = module.predict_step((places, index, STEPS[index]))
        write_npz(tmp_path / "parts4/by_step" / f"{start:08d}.npz", **found)
    seen = []
    module.source = lambda model, request: seen.append(list(request.indices)) or source("denoise")(model, request)
    made = collect(module, trainer, 4, tmp_path)
    request = StateRequest(module.grid, range(len(STEPS)), STEPS, 2)
    assert np.array_equal(made.x, source("denoise")(toy, request)[0])
    assert seen == [[9, 0, 8, 5]]


def test_states_and_conditions_stay_in_files(toy, trainer, tmp_path):
    labelled_toy = replace(toy, n_classes=4, null_label=4)
    module = CalibrationModule(labelled_toy, toy.time_grid(6), "denoise", seed=2)
    made = collect(module, trainer, 4, tmp_path)
    assert all(isinstance(array, np.memmap) for array in (made.x, made.conditions["y"]))
    labels = labelled_toy.draw_conditions(range(len(STEPS)), 2, CALIBRATION)["y"]
    assert made.conditions["y"].tolist() == labels.tolist()
    made.save(tmp_path / "set.npz")
    assert np.array_equal(made.x, type(made).load(tmp_path / "set.npz").x)
    assert [path.name for path in (tmp_path / "parts4").iterdir()] == ["by_step"]


def test_pieces_of_earlier_versions_in_the_folder_are_not_taken(toy, trainer, tmp_path):
    module = CalibrationModule(toy, toy.time_grid(6), "denoise", seed=2)
    index = torch.arange(4)
    write_npz(tmp_path / "parts4" / "00000000.npz", **module.predict_step((index, index, STEPS[index])))
    made = collect(module, trainer, 4, tmp_path)
    assert np.array_equal(made.x, source("denoise")(toy, StateRequest(module.grid, range(len(STEPS)), STEPS, 2))[0])


def test_samples_that_keep_their_batch_together_pay_for_their_own_steps(toy, trainer, tmp_path):
    """A solver with memory takes the whole batch to its last step: batches of like steps take fewer evaluations."""
    module = CalibrationModule(toy, toy.time_grid(6, solver="dpm_solver"), "denoise", seed=2)
    made = collect(module, trainer, 5, tmp_path)
    assert made.step.tolist() == STEPS.tolist()
    assert made.evaluations.tolist() == [2 if step < 3 else 5 for step in STEPS]


def test_an_unknown_source_is_refused_before_anything_runs(toy):
    with pytest.raises(ConfigError, match="calibration.source=images: choose one of"):
        CalibrationModule(toy, toy.time_grid(6), "images", seed=0)
