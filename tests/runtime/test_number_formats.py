"""Engines execute weights in a number format in float, as they are, and refuse activations in one."""

import pytest
import torch
from torch import nn

from ptq_exp.errors import ConfigError
from ptq_exp.quantization import Policy, Widths, calibrate_, quantize_
from ptq_exp.runtime import runtime_of


def quantized(weight, activation):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 32, 3), nn.SiLU(), nn.Conv2d(32, 8, 3), nn.SiLU(), nn.Conv2d(8, 3, 1))
    x = torch.randn(2, 3, 8, 8)
    quantize_(network, Policy(attention=False, first=("0",), last=("4",)).rules(Widths(weight, activation)), (x[:1],))
    calibrate_(network, "minmax", [(x,)])
    return network.eval(), x


@pytest.mark.parametrize(("weight", "activation"), [("nvfp4", 8), ("fp8_e4m3fn", 8), ("codebook4", 16)])
def test_weights_are_executed_in_float_with_the_values_that_they_have(weight, activation):
    network, x = quantized(weight, activation)
    runtime = runtime_of("torch")
    made = runtime.compile(network, (x[:1],))
    with torch.no_grad():
        torch.testing.assert_close(made(x), network(x), rtol=1e-4, atol=1e-5)
    (row,) = [row for row in runtime.account() if row.layer == "2"]
    assert (row.executed, row.reason) == ("float", f"number format {weight}: simulated only")


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "nvfp4", "fp8_e5m2"])
def test_activations_are_refused_by_the_setting(name):
    network, x = quantized(8, name)
    message = f"runtime=torch: 2.input_quantizer rounds to the number format {name}, which is simulated only: choose "
    with pytest.raises(ConfigError, match=message):
        runtime_of("torch").compile(network, (x[:1],))
