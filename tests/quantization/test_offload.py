"""Weights in files and answers on disk: networks of which one block is in memory at a time."""

import copy
import errno
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ptq_exp.errors import PTQError, QuantizationError
from ptq_exp.quantization.offload import (
    Answers,
    blocks_in_order,
    bring_in_before_calls_,
    evict,
    folder_of,
    last_readers,
    mapped,
    mapped_copy,
    release,
    stream_weights_,
    weight_bytes,
    without,
)
from ptq_exp.quantization.offload.writer import write_tensors


class Skipping(nn.Module):
    """Block c reads a's answer beside b's, a layer outside reads b's; blocks are declared in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({name: nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for name in "cba"})
        self.first, self.between, self.last = (nn.Linear(4, 4) for _ in range(3))
        self.calls: list[str] = []
        for name, block in self.blocks.items():
            block[0].register_forward_hook(lambda *_, name=name: self.calls.append(name))

    def forward(self, x):
        a = self.blocks["a"](self.first(x))
        b = self.blocks["b"](a * 2)
        skip = a.flip(0).flip(0)
        return self.last(self.blocks["c"](self.between(b) + skip))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Skipping()


ORDER = ["blocks.a", "blocks.b", "blocks.c"]


def test_blocks_come_in_the_order_of_their_calls(network):
    assert blocks_in_order(network, ("blocks.?",), (torch.ones(2, 4),)) == ORDER
    assert blocks_in_order(network, ("*.0",), (torch.ones(2, 4),)) == [f"{name}.0" for name in ORDER]
    assert blocks_in_order(network, ("nothing*",), (torch.ones(2, 4),)) == []


def test_the_last_reader_of_an_answer(network):
    readers = last_readers(network, ORDER, (torch.ones(2, 4),))
    # c reads a's through the skip; layers outside read b's and c's
    assert readers == {"blocks.a": "blocks.c", "blocks.b": None, "blocks.c": None}


def test_each_block_runs_once_per_batch_and_the_numbers_are_those_of_one_forward(network, tmp_path):
    batches = [(torch.randn(rows, 4),) for rows in (3, 2)]
    with torch.no_grad():
        expected = [network(*batch) for batch in batches]
    network.calls.clear()
    answers = Answers(tmp_path, last_readers(network, ORDER, batches[0]))
    network.calls.clear()
    for name in ORDER:
        for number, batch in enumerate(batches):
            answers.run(network, name, number, batch)
        answers.finish(name)
    assert network.calls == ["a", "a", "b", "b", "c", "c"]
    with torch.no_grad():
        found = [network.forward(*batch) for batch in answers.before(network, batches)]
    assert network.calls == ["a", "a", "b", "b", "c", "c"]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert "forward" not in vars(network.blocks["a"])
    continued = Answers(tmp_path, answers.readers)
    assert all(continued.has(name) for name in ORDER)


def test_what_nobody_reads_any_more_is_deleted_and_would_be_noticed(network, tmp_path):
    batch, readers = (torch.randn(3, 4),), {"blocks.a": "blocks.b", "blocks.b": None, "blocks.c": None}
    answers = Answers(tmp_path, readers)  # wrong: c reads a's, too
    sizes = []
    for name in ORDER[:2]:
        answers.run(network, name, 0, batch)
        sizes.append((tmp_path / "blocks.a" / "000000.safetensors").stat().st_size)
        answers.finish(name)
    assert (tmp_path / "blocks.a" / "000000.safetensors").stat().st_size < sizes[0] == sizes[1]
    answers.run(network, "blocks.c", 0, batch)
    answers.finish("blocks.c")
    with torch.no_grad():
        assert [bool(network.forward(*b).isnan().all()) for b in answers.before(network, [batch])] == [True]


def test_a_block_may_answer_tuples_with_none_but_nothing_unknown(tmp_path):
    class Several(nn.Module):
        def __init__(self, answer) -> None:
            super().__init__()
            self.block, self.answer = nn.Identity(), answer
            self.block.register_forward_hook(lambda _, args, y: answer(y))

        def forward(self, x):
            made, nothing, also = self.block(x)
            return made + also["more"] if nothing is None else nothing

    x = torch.randn(3, 2)
    network = Several(lambda y: (y, None, {"more": y * 2}))
    answers = Answers(tmp_path / "fine", {"block": None})
    answers.run(network, "block", 0, (x,))
    answers.finish("block")
    assert [torch.equal(network.forward(y), 3 * x) for (y,) in answers.before(network, [(x,)])] == [True]
    unknown = Several(lambda y: (y, {1, 2}, {}))
    with pytest.raises(QuantizationError, match="block returns a tuple, which cannot be kept on disk"):
        Answers(tmp_path / "unknown", {"block": None}).run(unknown, "block", 0, (x,))


def test_answers_have_the_strides_that_they_were_computed_with(tmp_path):
    class Turning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Conv2d(3, 4, 1).to(memory_format=torch.channels_last)
            self.block.register_forward_hook(lambda _, args, y: (y, y.mT, y.mean(0, keepdim=True).expand(2, 4, 5, 5)))

        def forward(self, x):
            return self.block(x)

    network, x = Turning(), torch.randn(2, 3, 5, 5)
    answers = Answers(tmp_path, {"block": None})
    answers.run(network, "block", 0, (x,))
    answers.finish("block")
    with torch.no_grad():
        expected = network(x)
        found = next(network.forward(*batch) for batch in answers.before(network, [(x,)]))
    assert expected[0].is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) and a.stride() == b.clone().stride()


def test_without_shares_everything_else(network):
    rest = without(network, ORDER[1:])
    assert {name for name, _ in rest.named_parameters() if "blocks" in name} == {
        "blocks.a.0.weight", "blocks.a.0.bias"}
    assert rest.first is network.first and rest.blocks is not network.blocks and len(network.blocks) == 3
    assert without(network, []) is network


def test_a_mapped_copy_is_independent_keeps_strides_and_leaves_no_files(tmp_path):
    network = nn.Sequential(nn.Conv2d(8, 4, 3), nn.Linear(4, 4), nn.BatchNorm1d(4)).to(torch.bfloat16)
    network[0].to(memory_format=torch.channels_last)
    network[1].weight = network[1].weight  # tied below
    network.append(copy.copy(network[1]))
    made = mapped_copy(network, tmp_path)
    assert list(tmp_path.iterdir()) == [] and made[3].weight is made[1].weight
    assert made[0].weight.stride() == network[0].weight.stride() and made[2].running_var is not network[2].running_var
    before = made[1].weight.clone()
    with torch.no_grad():
        made[1].weight.add_(1)
    release(made)
    assert torch.equal(made[1].weight, before + 1) and torch.equal(network[1].weight, before)


def test_weights_are_brought_in_once_for_each_call_and_given_back(monkeypatch):
    network, done = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), []
    monkeypatch.setattr(mapped, "bring_in", lambda module: done.append(("in", module)))
    monkeypatch.setattr(mapped, "release", lambda module: done.append(("out", module)))
    bring_in_before_calls_(network, ["0"])
    stream_weights_(network, ["0", "2"])
    network(torch.ones(1, 2))
    assert done == [(way, network[n]) for n in (0, 2) for way in ("in", "out")]


@pytest.mark.parametrize("again", [
    lambda network: pickle.loads(pickle.dumps(network)), copy.deepcopy, lambda network: network.to(torch.float64),
    lambda network: network.double().float(),
])
def test_weights_that_have_left_their_files_are_kept(tmp_path, again):
    """Memory that no file holds would be zeros after it was given back."""
    network = mapped_copy(nn.Sequential(nn.Linear(600, 600)), tmp_path)
    stream_weights_(network, ["0"])
    wanted = network[0].weight.double().clone()
    made = again(network)
    for _ in range(2):
        made(torch.ones(1, 600, dtype=made[0].weight.dtype))
    assert torch.equal(made[0].weight.double(), wanted) and folder_of(made) is None


def test_weights_without_memory_become_zeros(tmp_path):
    with torch.device("meta"):
        network = nn.Linear(3, 2)
    assert mapped_copy(network, tmp_path).weight.tolist() == [[0.0] * 3] * 2


def test_weights_that_are_left_on_the_disk_alone_are_read_again(tmp_path):
    network = nn.Sequential(nn.Linear(300, 300), nn.Conv2d(8, 4, 3)).to(torch.bfloat16)
    made = mapped_copy(network, tmp_path)
    with torch.no_grad():
        made[0].weight.add_(1)  # not written yet
    evict(made)
    evict(network)  # in no file
    assert torch.equal(made[0].weight, network[0].weight + 1) and torch.equal(made[1].weight, network[1].weight)
    with torch.device("meta"):
        evict(nn.Linear(3, 2))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_given_back(tmp_path):
    def resident(kind: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))

    network = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(16)))
    before = resident("RssAnon")
    made = mapped_copy(network, tmp_path)
    with torch.no_grad():
        for layer in made:
            layer.weight.mul_(2)
    assert resident("RssAnon") - before < weight_bytes(network) / 4
    used = resident("RssFile") + resident("RssShmem")
    release(made)
    assert used - resident("RssFile") - resident("RssShmem") > 0.9 * weight_bytes(network)
    assert torch.equal(made[3].weight, 2 * network[3].weight)


def test_a_file_written_tensor_by_tensor_has_the_bytes_of_the_library(tmp_path):
    tensors = {
        "b.weight": torch.randint(0, 255, (7, 3), dtype=torch.uint8), "a": torch.randn(3, 4).bfloat16(),
        "s": torch.tensor(3.0), "none": torch.zeros(0, 2), "q": torch.ones(2, dtype=torch.bool), "i": torch.arange(5),
    }
    write_tensors(tensors, tmp_path / "ours", {"format": "x"})
    save_file(tensors, tmp_path / "theirs", {"format": "x"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_full_disk_is_said_before_anything_is_mapped(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(PTQError, match="No space left on device; free space there"):
        mapped_copy(nn.Linear(3, 2), tmp_path)
    assert list(tmp_path.iterdir()) == []
