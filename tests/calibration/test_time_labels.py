"""The state that a drawn position stands for, and its time: as it should be, and as PTQ4DM's code has it."""

import numpy as np
import pytest
import torch

from ptq_exp.calibration import Constant, Uniform, labelled, positions
from ptq_exp.diffusion import NoiseSchedule, SampleNoise, TimeGrid, sample
from ptq_exp.diffusion.noise import CALIBRATION
from ptq_exp.errors import ConfigError
from ptq_exp.lightning import CalibrationModule, collect_calibration_set, make_trainer


def test_paired_states_have_the_time_of_the_step_that_they_enter(toy):
    grid = toy.time_grid(5, "leading")  # 33, 25, 17, 9, 1
    made = labelled(torch.tensor([0, 3, 4]), grid)
    assert made.enters.tolist() == made.step.tolist() == [0, 3, 4]
    assert made.t.tolist() == [33.0, 9.0, 1.0]


def test_reversed_labels_of_five_steps_by_hand(toy):
    """Positions 4 3 2 1 0 are the time indices 0 1 2 3 4: the passes of the loop after which the code keeps the state.

    Pass 0 is the noisiest, so that its state enters position 1; the label is the number of the pass.
    """
    made = labelled(torch.tensor([4, 3, 2, 1, 0]), toy.time_grid(5, "leading"), "reversed")
    assert made.enters.tolist() == [1, 2, 3, 4, 5]
    assert made.t.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0] and made.t.dtype == torch.float32
    assert made.step.tolist() == [1, 2, 3, 4, 4]  # the finished image enters no step


def test_label_100_of_the_published_script_belongs_to_the_network_time_594():
    """250 of 4000 steps, times scaled to 0..1000: the pairing found by running the published code."""
    grid = TimeGrid.from_schedule(NoiseSchedule(torch.linspace(1, 0, 4000), time_scale=0.25), 250, "linspace")
    made = labelled(torch.arange(250), grid, "reversed")
    kept = (made.t == 100).nonzero().item()
    assert grid.network_time(int(made.enters[kept])).item() == 594.25
    inside = made.enters < 250
    true, label = grid.network_time(made.enters[inside]), made.t[inside]
    assert torch.corrcoef(torch.stack([true, label]))[0, 1] < -0.9999
    assert 420 < (true - label).abs().mean() < 430
    assert (label.min(), made.t.max()) == (0, 249)


@pytest.mark.parametrize("solver", ["ddim", "dpm_solver", "pndm"])
def test_reversed_states_are_those_after_the_pass_of_their_label(toy, solver, tmp_path):
    grid = toy.time_grid(6, "leading", solver=solver)
    n = 2 * len(grid)  # pndm takes one step more
    drawn = positions(Uniform(), n, len(grid), seed=3)
    module = CalibrationModule(toy, grid, "denoise", seed=3)
    trainer = make_trainer("test", accelerator="cpu", progress_bar=False)
    states = labelled(drawn, grid, "reversed")
    made = collect_calibration_set(module, trainer, states, n, tmp_path / "parts")

    after = []  # the state that leaves each pass is the one that enters the next
    noise = SampleNoise(3, range(n), toy.sample_shape, stream=CALIBRATION)
    end = sample(toy.denoiser, grid, noise, clip_sample=False, on_step=lambda record: after.append(record.x))
    after = [*after[1:], end]
    assert sorted(made.t.tolist()) == sorted(2 * list(range(len(grid))))
    for i, label in enumerate(made.t):
        np.testing.assert_array_equal(made.x[i], after[int(label)][i])


def test_the_last_position_costs_one_pass_where_it_is_reversed(toy):
    """`naive_last`, the cleanest state, becomes the state after the first pass."""
    states = labelled(positions(Constant("last"), 3, 6, 0), toy.time_grid(6), "reversed")
    assert (states.enters.tolist(), states.t.tolist()) == ([1, 1, 1], [0.0, 0.0, 0.0])


def test_unknown_labels_are_refused(toy):
    with pytest.raises(ConfigError, match="calibration.labels=mirrored: choose one of paired, reversed"):
        labelled(torch.tensor([0]), toy.time_grid(5), "mirrored")
