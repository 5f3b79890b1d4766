"""The runtime `simulate` is the quantized network itself; other names are refused with those that there are."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import ptq_exp
from ptq_exp.errors import ConfigError
from ptq_exp.quantization import Policy, Widths, calibrate_, quantize_
from ptq_exp.runtime import RUNTIMES, ExecutedLayer, Execution, runtime_of

GOLDEN = Path(__file__).parents[1] / "golden" / "saved_model_1.zip"


class Small(nn.Module):
    """Three layers, one of them left in full precision."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv_in, self.body, self.conv_out = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 1, 1)

    def forward(self, x, t):
        return self.conv_out(self.body(self.conv_in(x)).relu()) + t.view(-1, 1, 1, 1)


def test_the_simulation_is_the_network_and_lists_every_operation():
    network, x, t = Small(), torch.randn(4, 1, 5, 5), torch.arange(4.0)
    quantize_(network, Policy(attention=False).rules(Widths(4, 8)), (x[:1], t[:1]))
    calibrate_(network, "minmax", [(x, t)])
    with torch.no_grad():
        before = network(x, t)
    runtime = runtime_of("simulate")
    compiled = runtime.compile(network, (x[:1], t[:1]))
    with torch.no_grad():
        assert torch.equal(compiled(x, t), before)
    found = runtime.account()
    assert [(row.layer, row.kind, row.macs) for row in found] == [
        ("conv_in", "Conv2d", 5 * 5 * 4 * 9), ("body", "Conv2d", 5 * 5 * 16), ("conv_out", "Conv2d", 5 * 5 * 4)
    ]
    assert all(row.executed == "float" and row.kernel == "torch" and row.reason for row in found)


def test_an_unknown_runtime_is_refused_with_the_valid_ones(tmp_path):
    with pytest.raises(ConfigError, match="^runtime=abacus: choose one of simulate, openvino, torch$"):
        runtime_of("abacus")
    # before any file is read
    with pytest.raises(ConfigError, match="^runtime=abacus: choose one of simulate, openvino, torch$"):
        ptq_exp.load_quantized(tmp_path / "nowhere", runtime="abacus")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("openvino", {"precision": "f16"}, "runtime.precision=f16: choose one of f32, bf16"),
        ("openvino", {"weights": "6bit"}, "runtime.weights=6bit: choose one of as_saved, 7bit, groups"),
        ("openvino", {"speed": 2}, "runtime=openvino has no option speed"),
        (
            "torch", {"precision": "bf16"},
            "runtime.precision=bf16: runtime=torch computes the rest in f32: leave it out",
        ),
        ("torch", {"weights": "6bit"}, "runtime.weights=6bit: choose one of as_saved, 7bit"),
        ("torch", {"threads": 1}, "runtime=torch has no option threads"),
    ],
)
def test_an_unknown_option_is_refused(name, options, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        runtime_of(name, options)


class Doubling:
    """A runtime of somebody else's, which gives twice the estimate."""

    name = "doubling"

    def compile(self, network, example_call):
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.network = network

            def forward(self, *call, **conditions):
                return 2 * self.network(*call, **conditions)

        self.network, self.example = network, example_call
        return Twice()

    def account(self):
        return Execution([ExecutedLayer("all", "network", "float", "twice", 0, "it doubles")])


def test_a_runtime_of_ones_own_executes_what_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(RUNTIMES, "doubling", f"{__name__}:Doubling")
    monkeypatch.setitem(__import__("sys").modules, __name__, type("Module", (), {"Doubling": Doubling}))
    zipfile.ZipFile(GOLDEN).extractall(tmp_path)
    given = {"checkpoint": str(tmp_path / "model")}
    plain = ptq_exp.load_quantized(tmp_path / "quantized", **given)
    doubled = ptq_exp.load_quantized(tmp_path / "quantized", **given, runtime="doubling")
    expected = np.load(tmp_path / "expected.npz")
    call = torch.from_numpy(expected["x"]), torch.from_numpy(expected["t"])
    with torch.no_grad():
        assert torch.equal(doubled.denoiser(*call), 2 * plain.denoiser(*call))
        assert torch.equal(doubled.network(*call), plain.network(*call))  # what is saved stays the simulation
    assert [row.kernel for row in doubled.runtime.account()] == ["twice"]
    assert {row.executed for row in plain.runtime.account()} == {"float"}
