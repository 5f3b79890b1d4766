"""One fit, one epoch per block; a killed run goes on at its block and ends as an uninterrupted one, bit for bit."""

import importlib.util
import os
import signal
import textwrap
import traceback

import pytest
import torch

from ptq_exp.errors import DataError
from ptq_exp.reconstruction import GPTQSettings, learned_tensors, put_learned_

SCRIPT = textwrap.dedent('''
    """Reconstruct a tiny network; see `main`."""
    import os, signal

    import numpy as np
    import torch
    from torch import nn

    torch.set_num_threads(1)
    from ptq_exp.calibration import CalibrationSet
    from ptq_exp.lightning import reconstruct_network
    from ptq_exp.quantization import (
        Policy, Widths, calibrate_activations_, calibrate_weights_, quantize_, select_row
    )
    from ptq_exp.reconstruction import Annealing, BlockOptimisation, Reconstruction, Settings, find_blocks

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1),
                                         nn.Conv2d(4, 1, 3, padding=1)])
            self.dropout = nn.Dropout(0.5)
        def forward(self, x, t, y=None):
            for layer in self.layers:
                x = self.dropout(torch.tanh(layer(x)))
            return x

    def networks():
        torch.manual_seed(0)
        full = Net().eval()
        quantized = Net().eval()
        quantized.load_state_dict(full.state_dict())
        rng = np.random.default_rng(0)
        steps = np.arange(24) % 2
        x = rng.standard_normal((24, 1, 5, 5), dtype=np.float32) * np.where(steps, 0.1, 1).reshape(-1, 1, 1, 1)
        calibration_set = CalibrationSet(x.astype(np.float32), steps, steps.astype(np.float32), np.zeros(24, int))
        example = (torch.zeros(1, 1, 5, 5), torch.zeros(1))
        quantize_(quantized, Policy(first=(), last=(), attention=False).rules(Widths(3, 4), bins=2), example)
        calibrate_weights_(quantized, "minmax")
        for row in (0, 1):
            select_row(quantized, row)
            chosen = calibration_set.take((steps == row).nonzero()[0])
            calibrate_activations_(quantized, "minmax", [(x, t) for x, t, _ in chosen.batches(8)])
        return full, quantized, calibration_set, find_blocks(quantized, (), example)

    def main(folder, kill_at, kill_in):
        """Into `folder`; killed at the call number `kill_at`, from 1, of the method or function `kill_in`; 0: never."""
        full, quantized, calibration_set, blocks = networks()
        settings = Settings(Annealing(6), batch_size=8, lr=0.1, step_lr=1e-3, input_prob=0.5, drop_prob=0.5)
        made = Reconstruction(quantized, full, blocks, calibration_set, settings, seed=0, batch_size=8,
                              cache_bytes=1000, folder=folder / "rows", row_of_step=torch.tensor([0, 1]))
        calls = 0
        def dying(function):
            def counted(*args):
                nonlocal calls
                calls += 1
                if calls == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args)
            return counted
        if kill_at:
            if kill_in == "write":
                import ptq_exp.storage.atomic
                ptq_exp.storage.atomic.os.replace = dying(os.replace)
            else:
                setattr(made, kill_in, dying(getattr(made, kill_in)))
        reports = reconstruct_network(made, folder / "blocks.ckpt", accelerator="cpu", progress_bar=False)
        plain = [{k: v for k, v in report.to_dict().items() if k != "seconds"} for report in reports]
        torch.save({"state": quantized.state_dict(), "reports": plain, "calls": calls}, folder / "result.pt")
''')


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The script as a module."""
    path = tmp_path_factory.mktemp("script") / "reconstruct_toy.py"
    path.write_text(SCRIPT)
    spec = importlib.util.spec_from_file_location("reconstruct_toy", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def killed(toy, folder, kill_at, kill_in) -> bool:
    """Whether a process that runs the script was killed; it is forked from this one, which has loaded torch already."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            toy.main(folder, kill_at, kill_in)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert ended in (0, -signal.SIGKILL)
    return ended == -signal.SIGKILL


@pytest.fixture(scope="module")
def uninterrupted(toy, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("whole")
    toy.main(folder, 0, "")
    return torch.load(folder / "result.pt")


# in the middle of the first block, of the second one, when a block's end is reached, and while a checkpoint is written
@pytest.mark.parametrize(
    ("kill_at", "kill_in", "done"), [(3, "step", 0), (9, "step", 1), (2, "end", 1), (2, "write", 1)]
)
def test_a_killed_run_goes_on_at_its_block_and_ends_bit_identical(
    kill_at, kill_in, done, toy, uninterrupted, tmp_path
):
    assert killed(toy, tmp_path, kill_at, kill_in)
    assert not (tmp_path / "result.pt").exists()
    checkpoint = tmp_path / "blocks.ckpt"
    assert checkpoint.exists() == bool(done)
    if done:
        kept = torch.load(checkpoint, weights_only=True)
        learned = learned_tensors(toy.networks()[1])
        assert len(kept["block_reports"]) == done and set(kept["state_dict"]) == set(learned)
    toy.main(tmp_path, 0, "")
    resumed = torch.load(tmp_path / "result.pt")
    assert resumed["reports"] == uninterrupted["reports"] and len(resumed["reports"]) == 3
    assert resumed["state"].keys() == uninterrupted["state"].keys()
    assert all(torch.equal(value, uninterrupted["state"][key]) for key, value in resumed["state"].items())


def test_a_run_killed_after_its_last_block_has_nothing_left_to_do(toy, uninterrupted, tmp_path):
    toy.main(tmp_path, 0, "")
    (tmp_path / "result.pt").unlink()
    toy.main(tmp_path, 1, "begin")  # would be killed at the first block that it began
    again = torch.load(tmp_path / "result.pt")
    assert again["calls"] == 0 and again["reports"] == uninterrupted["reports"]
    assert all(torch.equal(value, uninterrupted["state"][key]) for key, value in again["state"].items())


def test_a_checkpoint_of_all_tensors_as_earlier_versions_wrote_it_is_continued(toy, uninterrupted, tmp_path):
    assert killed(toy, tmp_path, 9, "step")
    kept = torch.load(tmp_path / "blocks.ckpt", weights_only=True)
    every = {**toy.networks()[1].state_dict(), **kept["state_dict"]}
    kept["state_dict"] = {f"network.{name}": value for name, value in every.items()}
    torch.save(kept, tmp_path / "blocks.ckpt")
    toy.main(tmp_path, 0, "")
    resumed = torch.load(tmp_path / "result.pt")
    assert resumed["reports"] == uninterrupted["reports"]
    assert all(torch.equal(value, uninterrupted["state"][key]) for key, value in resumed["state"].items())


def test_a_checkpoint_of_another_network_is_refused_and_changes_nothing(toy):
    network = toy.networks()[1]
    other = {name: value + 1 for name, value in learned_tensors(network).items()}
    before = {name: value.clone() for name, value in network.state_dict().items()}
    name, value = other.popitem()
    for wrong in (other, {**other, name: value[None]}, {**other, name: value, "x": value}):
        with pytest.raises(DataError, match="belongs to another network"):
            put_learned_(network, wrong)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    put_learned_(network, {**other, name: value})
    assert torch.equal(learned_tensors(network)[name], value)


def test_the_progress_bar_names_block_and_loss(toy, tmp_path, capsys):
    full, quantized, calibration_set, blocks = toy.networks()
    made = toy.Reconstruction(
        quantized, full, blocks, calibration_set, toy.Settings(toy.Annealing(2)), seed=0, batch_size=8, cache_bytes=1e6,
        folder=tmp_path, row_of_step=torch.tensor([0, 1]),
    )
    reports = toy.reconstruct_network(made, tmp_path / "blocks.ckpt", accelerator="cpu")
    said = capsys.readouterr()
    assert len(reports) == 3
    for text in ("block 1 of 3: layers.0", "block 3 of 3: layers.2", "loss="):
        assert text in said.out + said.err
    assert not full.training and not quantized.training


def test_gptq_that_broke_off_goes_on_at_its_block(toy, tmp_path):
    def made(folder):
        full, quantized, calibration_set, blocks = toy.networks()
        return quantized, toy.Reconstruction(
            quantized, full, blocks, calibration_set, GPTQSettings(), seed=0, batch_size=8, cache_bytes=1000,
            folder=folder / "rows", row_of_step=torch.tensor([0, 1]),
        )

    def fit(reconstruction, folder):
        reports = toy.reconstruct_network(
            reconstruction, folder / "blocks.ckpt", accelerator="cpu", progress_bar=False
        )
        return [{k: v for k, v in report.to_dict().items() if k != "seconds"} for report in reports]

    whole, reconstruction = made(tmp_path / "whole")
    expected = fit(reconstruction, tmp_path / "whole")
    _, reconstruction = made(tmp_path)
    step = reconstruction.step
    reconstruction.step = lambda: step() if len(reconstruction.reports) < 2 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        fit(reconstruction, tmp_path)
    continued, reconstruction = made(tmp_path)
    assert fit(reconstruction, tmp_path) == expected and all(report["details"] for report in expected)
    state = whole.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in continued.state_dict().items())
