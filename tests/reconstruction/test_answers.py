"""Finished blocks are not computed again while inputs are captured, and nothing else is different."""

import pytest
import torch
from all_blocks import run
from torch import nn

from ptq_exp.reconstruction import Annealing, Arena, Reconstruction, Settings, find_blocks
from ptq_exp.reconstruction.answers import BlockAnswers

EXAMPLE = (torch.zeros(1, 1, 6, 6), torch.zeros(1))


def reconstruction(network, toy, calibration_set, folder, limit=1e9):
    return Reconstruction(
        network, toy, find_blocks(network, ("*resnets.*",), EXAMPLE), calibration_set,
        Settings(Annealing(4), lr=0.05, batch_size=16, step_lr=1e-3), seed=0, batch_size=16, cache_bytes=limit,
        folder=folder,
    )


def test_all_numbers_are_those_without_room_for_answers(toy, quantized, calibration_set, tmp_path):
    states, reports = [], []
    for limit in (1e9, 30_000, 0):
        network = quantized(3)
        made = reconstruction(network, toy, calibration_set, tmp_path, limit)
        found = [report.to_dict() | {"seconds": 0} for report in run(made)]
        assert made.arena.reserved <= limit / 2 and bool(made.arena.reserved) == bool(limit)
        reports.append(found)
        states.append(network.state_dict())
    assert reports[0] == reports[1] == reports[2]
    for state in states[1:]:
        assert all(torch.equal(value, states[0][key]) for key, value in state.items())


@pytest.mark.parametrize(("limit", "each"), [(1e9, 1), (0, 2)])
def test_a_finished_block_runs_once_more_for_each_batch(limit, each, toy, quantized, calibration_set, tmp_path):
    network = quantized(3)
    made = reconstruction(network, toy, calibration_set, tmp_path, limit)
    names = [block.name for block in made.blocks]
    for _ in made.remaining:
        if made.block.name == names[-2]:  # two more captures
            break
        made.begin()
        made.step()
        made.end()
    ran = []
    handle = network.get_submodule(names[-3]).register_forward_pre_hook(lambda *_: ran.append(1))
    for _ in made.remaining:
        made.begin()
        made.step()
        made.end()
    handle.remove()
    batches = sum(-(-len(samples) // 16) for samples in (made.optimised_on, made.held_out))
    assert len(ran) == each * batches
    for module in [*network.modules(), *toy.modules()]:
        assert "forward" not in vars(module) and not module._forward_hooks and not module._forward_pre_hooks


class Chain(nn.Module):
    """Two layers; the output of the first is changed in place behind it."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.last(self.first(x).mul_(2))


def test_answers_are_those_before_a_change_in_place_and_of_the_batch_that_runs(tmp_path):
    torch.manual_seed(0)
    network, batches = Chain().requires_grad_(False), [(torch.randn(n, 3),) for n in (4, 4, 2)]
    expected = [network(*batch) for batch in batches]
    answers = BlockAnswers(network, Arena(1e6, tmp_path))
    for _ in range(3):
        found = [network(*batch) for batch in answers.before(batches, ["first"])]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    network.first.weight.fill_(torch.nan)  # is not looked at
    for batch, wanted in zip(answers.before(batches, ["first"]), expected, strict=True):
        assert torch.equal(network(*batch), wanted)
        # asked for other rows: those of the first one
        assert torch.equal(network(batch[0][[0]])[0], network(*batch)[0])
    assert network(*batches[0]).isnan().all()


def test_what_broke_off_leaves_no_answers_and_no_trace(tmp_path):
    network, batches = Chain().requires_grad_(False), [(torch.randn(4, 3),), (torch.randn(4, 3),)]
    answers = BlockAnswers(network, Arena(1e6, tmp_path))
    with pytest.raises(ZeroDivisionError):
        for batch in answers.before(batches, ["first"]):
            network(*batch)
            raise ZeroDivisionError
    assert not network.first._forward_hooks
    network.first.weight.zero_()
    expected = [network(*batch) for batch in batches]
    for _ in range(2):
        found = [network(*batch) for batch in answers.before(batches, ["first"])]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_block_that_shares_a_parameter_with_a_later_one_is_computed(toy, quantized, calibration_set, tmp_path):
    network = quantized(3)
    made = reconstruction(network, toy, calibration_set, tmp_path)
    network.resnets[1].conv1.weight = network.resnets[0].conv1.weight
    names = [block.name for block in made.blocks]
    made.reports = [None] * (names.index("resnets.0") + 1)
    assert made._finished() == names[: names.index("resnets.0")]
    made.reports = [None] * (names.index("resnets.1") + 1)
    assert made._finished() == names[: names.index("resnets.1") + 1]
