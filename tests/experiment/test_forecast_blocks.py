"""The forecast of a reconstruction: of the blocks that were tried, and of what enters and leaves all of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_forecasts import SMALLEST

from ptq_exp.experiment.forecast import blocks, speeds
from ptq_exp.experiment.forecast.probe import Line
from ptq_exp.experiment.forecast.work import FULL, OBSERVED, QUANTIZED
from ptq_exp.experiment.plan import Plan
from ptq_exp.settings.compose import composed_from


def test_gptq_takes_a_part_for_each_state_and_leaves_the_network_alone(placed, monkeypatch):
    run, settings = placed[0], composed_from([*SMALLEST, "+experiment=gptq"])
    config, plan = settings.reconstruction, Plan.of(settings, run.grid)
    known = speeds.Speeds(run, plan, {FULL: 2, QUANTIZED: 2, OBSERVED: 2})
    network = known.placed.network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    rounded = []

    def measured(work, device):
        work()
        rounded.append(sum(not torch.equal(value, before[name]) for name, value in network.state_dict().items()))
        return 3.0 + 0.5 * states[-1], 0.0

    states, make = [], blocks._states
    monkeypatch.setattr(blocks, "_states", lambda speeds, n: states.append(n) or make(speeds, n))
    monkeypatch.setattr(blocks, "measured", measured)
    found = blocks.blocks_of(run, plan, config, network, run.model.denoiser)
    assert blocks._gptq_seconds(known, config, found[1], 100) == pytest.approx(3.0 + 0.5 * 100)
    assert all(rounded)  # it was tried indeed
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_inputs_are_captured_by_two_passes_whatever_the_number_of_blocks(placed, monkeypatch):
    """As finished blocks answer from memory: the network is not run as far as each block."""
    run, settings = placed[0], composed_from([*SMALLEST, "reconstruction=brecq", "reconstruction.iterations=7"])
    plan = Plan.of(settings, run.grid)
    known = speeds.Speeds(run, plan, {FULL: 2, QUANTIZED: 2, OBSERVED: 2})
    known.full = Line(0.0, 10.0)
    placed_network = replace(known.placed, observed=Line(0.0, 1.0))
    known.placed = placed_network
    monkeypatch.setattr(blocks, "_step_seconds", lambda *_: 0.25)
    monkeypatch.setattr(blocks, "_tried", lambda sizes, near, measure: ([0.0], [measure(near[0])]))
    count = len(blocks.blocks_of(run, plan, settings.reconstruction, placed_network.network, run.model.denoiser))
    found = blocks.reconstruction_seconds(known, settings.reconstruction, 12)
    assert count > 5 and found == pytest.approx(7 * count * 0.25 + 2 * 12 * (10 + 1))


def test_blocks_between_those_that_were_tried_are_in_proportion(monkeypatch):
    sizes = [10, 40, 20, 30, 0]
    x, y = blocks._tried(sizes, range(5), lambda place: 2.0 * sizes[place])
    assert np.allclose(np.interp(sizes, x, y), [2.0 * size for size in sizes])
    x, y = blocks._tried(sizes, [2], lambda place: {2: 7.0}[place])  # no other can be measured
    assert np.allclose(np.interp(sizes, x, y), [0.35 * size for size in sizes])
    # those that can be measured are of one size, and smaller and larger ones lie behind them
    x, y = blocks._tried([1, 40, 40, 40, 80], [1, 2, 3], lambda place: {1: 3.0, 2: 4.0, 3: 5.0}[place])
    assert np.interp([1, 40, 80], x, y) == pytest.approx([0.1, 4, 8])
    monkeypatch.setattr(blocks, "_PATIENCE", -1.0)  # the middle one alone
    x, y = blocks._tried(sizes, range(5), lambda place: 2.0 * sizes[place])
    assert np.allclose(np.interp(sizes, x, y), [2.0 * size for size in sizes])
