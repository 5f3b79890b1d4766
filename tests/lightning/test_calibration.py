"""Collecting a calibration set through Lightning: batches, order, labels and cost."""

import pytest
import torch

from ptq_exp.calibration import StateRequest, source
from ptq_exp.errors import ConfigError
from ptq_exp.lightning import CalibrationModule, collect_calibration_set

STEPS = torch.tensor([3, 0, 5, 1, 2, 4, 5, 0, 3, 2])


def test_the_set_does_not_depend_on_the_batch_size(digits, trainer):
    module = CalibrationModule(digits, digits.time_grid(6), "denoise", seed=2)
    whole = collect_calibration_set(module, trainer, STEPS, 64)
    parts = collect_calibration_set(module, trainer, STEPS, 3)
    torch.testing.assert_close(parts.x, whole.x, rtol=0, atol=1e-5)
    for made in (whole, parts):
        assert torch.equal(made.step, STEPS)
        assert torch.equal(made.t, module.grid.timesteps[STEPS].float())
        assert made.evaluations == int(STEPS.sum()) == 25


@pytest.mark.parametrize("name, eta", [("denoise", 0.0), ("denoise", 1.0), ("diffuse", 0.0), ("raw", 0.0)])
def test_the_set_is_what_the_source_gives(toy, trainer, name, eta):
    images = torch.linspace(-1, 1, 3 * 16).reshape(3, 1, 4, 4)
    grid = toy.time_grid(6)
    module = CalibrationModule(toy, grid, name, seed=2, eta=eta, images=images)
    made = collect_calibration_set(module, trainer, STEPS, 4)
    request = StateRequest(grid, range(len(STEPS)), STEPS, 2, eta=eta, images=images)
    expected, evaluations = source(name)(toy, request)
    assert torch.equal(made.x, expected) and made.evaluations == evaluations


def test_samples_are_in_the_order_of_their_index_whatever_the_order_of_the_batches(toy):
    """Devices that share the work hand their batches back in any order."""

    class Reversed:
        def predict(self, module, batches):
            return [module.predict_step(batch) for batch in reversed(list(batches))]

    module = CalibrationModule(toy, toy.time_grid(6), "denoise", seed=2)
    made = collect_calibration_set(module, Reversed(), STEPS, 4)
    request = StateRequest(module.grid, range(len(STEPS)), STEPS, 2)
    assert torch.equal(made.x, source("denoise")(toy, request)[0])
    assert torch.equal(made.step, STEPS)


def test_an_unknown_source_is_refused_before_anything_runs(toy):
    with pytest.raises(ConfigError, match="calibration.source=images: choose one of"):
        CalibrationModule(toy, toy.time_grid(6), "images", seed=0)
