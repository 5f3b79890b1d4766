"""Targets of inner losses: computed once per row where there is room, and the same numbers either way."""

import pytest
import torch
from all_blocks import run
from torch import nn

from ptq_exp.reconstruction import Arena, Calls, Reconstruction, Settings, find_blocks
from ptq_exp.reconstruction.adaround import Annealing
from ptq_exp.reconstruction.inner import InnerTargets

NAMES = ("0", "2")


class Counted(nn.Sequential):
    """Three layers; counts its forwards."""

    forwards = 0

    def forward(self, x):
        self.forwards += 1
        return super().forward(x)


def block() -> Counted:
    torch.manual_seed(0)
    return Counted(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.Conv2d(3, 1, 1))


def targets(module, limit, tmp_path, times=100, rows=10):
    x = torch.randn(rows, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    arena = None if limit is None else Arena(limit, tmp_path)
    return InnerTargets(module, NAMES, Calls.of((x,), {}), 4, times, arena)


def test_rows_are_computed_once_and_equal_those_computed_each_time(tmp_path):
    module = block()
    kept, computed = targets(module, 1e6, tmp_path), targets(block(), None, tmp_path)
    assert computed.kept is None
    before = module.forwards
    for index in (torch.tensor([9, 0, 4, 3]), torch.tensor([1, 2, 8, 9]), torch.tensor([7, 6, 5, 4])):
        found, wanted = kept.rows(index), computed.rows(index)
        assert set(found) == set(wanted) == set(NAMES)
        assert all(torch.equal(found[name], wanted[name]) for name in NAMES)
    assert module.forwards == before and not any(layer._forward_hooks for layer in module)


@pytest.mark.parametrize(("limit", "times"), [(None, 100), (10 * 4 * (3 * 16 + 3 * 4) - 1, 100), (1e6, 2)])
def test_without_room_or_where_few_are_asked_for_nothing_is_kept(limit, times, tmp_path):
    assert targets(block(), limit, tmp_path, times).kept is None
    assert not list(tmp_path.iterdir())


def test_just_enough_room_is_enough(tmp_path):
    assert targets(block(), 10 * 4 * (3 * 16 + 3 * 4), tmp_path).kept is not None


def test_outputs_without_a_row_for_each_sample_are_computed_each_time(tmp_path):
    class Merged(nn.Sequential):
        def forward(self, x):
            return super().forward(x.flatten(0, 1)[:, None])

    module = Merged(nn.Conv2d(1, 1, 3), nn.ReLU(), nn.Conv2d(1, 1, 3))
    found = targets(module, 1e6, tmp_path)
    assert found.kept is None and len(found.rows(torch.tensor([0, 1]))["0"]) == 4


def test_a_reconstruction_is_the_same_with_and_without_room(toy, quantized, calibration_set, tmp_path):
    states, example = [], (torch.zeros(1, 1, 6, 6), torch.zeros(1))
    for limit in (1e9, 0):
        network = quantized(3)
        settings = Settings(Annealing(8), lr=0.05, batch_size=16, step_lr=1e-3, input_prob=0.5, inner_weight=0.5)
        made = Reconstruction(
            network, toy, find_blocks(network, ("*resnets.*",), example), calibration_set, settings, seed=0,
            batch_size=16, cache_bytes=limit, folder=tmp_path,
        )
        losses = [report.loss for report in run(made)]
        states.append(network.state_dict() | {"losses": torch.tensor(losses)})
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
