"""Conditions: balanced, of (seed, index) alone, and read from files; calls of networks by name."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ptq_exp.diffusion import Call, ConditionTable
from ptq_exp.diffusion.noise import CALIBRATION
from ptq_exp.errors import ConfigError, DataError

ROWS = {"y": torch.tensor([3, 7, 11, 15]), "size": torch.rand(4, 2)}


def test_conditions_are_balanced_and_of_seed_and_index_alone():
    table = ConditionTable(ROWS)
    drawn = table.draw(range(40), 0)
    assert len(table) == 4 and drawn["y"].bincount()[[3, 7, 11, 15]].tolist() == [10] * 4
    for i, label in enumerate(drawn["y"].tolist()):  # rows stay together
        assert torch.equal(drawn["size"][i], ROWS["size"][ROWS["y"].tolist().index(label)])
    assert torch.equal(table.draw([31, 2], 0)["y"], drawn["y"][[31, 2]])
    assert len({tuple(table.draw(range(4), seed)["y"].tolist()) for seed in range(8)}) > 1
    assert any(not torch.equal(table.draw(range(4), s, CALIBRATION)["y"], table.draw(range(4), s)["y"])
               for s in range(8))


def test_a_model_draws_with_its_conditions(toy):
    model = replace(toy, conditions=ConditionTable({"y": ROWS["y"]}, {"y": torch.tensor(90)}))
    call = model.example_inputs()
    assert call.conditions["y"].tolist() == [3] and call.evaluate(model.denoiser).shape == (1, 1, 2, 2)
    assert model.labels(range(3), 0) is None and model.unconditional == {"y": 90}
    grid = model.time_grid(3)
    images = model.sample(model.denoiser, grid, range(5), 0)
    assert torch.equal(model.sample(model.denoiser, grid, [4], 0), images[4:])
    toy.denoiser.calls.clear()
    model.sample(model.guided(model.denoiser, 2.0), grid, range(2), 0)
    drawn = model.draw_conditions(range(2), 0)["y"].tolist()
    assert all(y.tolist() == [90, 90, *drawn] for _, _, y in toy.denoiser.calls)


def test_the_network_is_asked_for_its_arguments_when_the_model_is_made(toy):
    with pytest.raises(ConfigError, match=r"model toy: its denoiser cannot be called as denoiser\(x, t, tokens=...\)"):
        replace(toy, conditions=ConditionTable({"tokens": torch.rand(1, 2)}))

    class Other(torch.nn.Module):
        def forward(self, x, t, label):
            return x

    with pytest.raises(ConfigError, match=r"denoiser\(x, t, y=...\).*'label'"):
        replace(toy, denoiser=Other(), n_classes=3)


def test_a_call_is_repeated_and_holds_keyword_arguments_at_its_end():
    call = Call(torch.rand(1, 1, 2, 2), torch.tensor([5.0]), {"y": torch.tensor([2])}).expanded(3)
    assert call.x.shape == (3, 1, 2, 2) and call.t.tolist() == [5.0] * 3
    *positional, named = call
    assert len(positional) == 2 and named["y"].tolist() == [2, 2, 2]
    assert call.evaluate(lambda x, t, y: (x + t.view(-1, 1, 1, 1) + y.view(-1, 1, 1, 1)).shape) == (3, 1, 2, 2)


def test_a_file_gives_the_table(tmp_path):
    size, none = np.random.rand(2, 3), np.zeros(3)
    np.savez(tmp_path / "c.npz", y=np.array([1, 2], np.int32), size=size, **{"unconditional.size": none})
    table = ConditionTable.read(tmp_path / "c.npz")
    assert table.rows["y"].dtype == torch.int64 and table.rows["size"].dtype == torch.float32
    np.testing.assert_allclose(table.rows["size"], size, rtol=1e-6)
    assert table.unconditional.keys() == {"size"} and table.unconditional["size"].tolist() == [0, 0, 0]


@pytest.mark.parametrize(("arrays", "expected"), [
    ({}, "found none"), ({"y": np.zeros(0)}, "found 0 of y"), ({"y": np.array(3)}, "found 0 of y"),
    ({"y": np.zeros(2), "z": np.zeros(3)}, "2 of y, 3 of z"), ({"y": np.array(["a", "b"])}, "conditions are numbers"),
    ({"y": np.array([1, np.nan])}, "y holds NaN"),
    ({"y": np.zeros((2, 3)), "unconditional.y": np.zeros(4)}, r"has the shape \(4,\), but a row of y has \(3,\)"),
    ({"y": np.zeros(2), "unconditional.z": np.zeros(1)}, "there is no such condition"),
])
def test_files_that_are_none(tmp_path, arrays, expected):
    np.savez(tmp_path / "c.npz", **arrays)
    with pytest.raises(DataError, match=rf"model\.conditions=.*c\.npz: .*{expected}"):
        ConditionTable.read(tmp_path / "c.npz")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"model\.conditions=.*c\.npz: no such file"):
        ConditionTable.read(tmp_path / "c.npz")
