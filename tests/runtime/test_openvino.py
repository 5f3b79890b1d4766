"""Networks compiled by OpenVINO: 8-bit kernels where the plan says so, and the numbers of the simulation."""

import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch import nn

from ptq_exp.errors import ConfigError, PTQError
from ptq_exp.quantization import calibrate_, select_row
from ptq_exp.runtime.account import Executed, executed_layers, int8_share
from ptq_exp.runtime.deployable import deployable
from ptq_exp.runtime.openvino import OpenVINONetwork
from ptq_exp.runtime.plan import integer_plan


def engine(network, plan=None) -> OpenVINONetwork:
    return OpenVINONetwork(deployable(network, plan or integer_plan(network)), threads=1, try_first=False)


def error(found, wanted) -> float:
    return float((found - wanted).norm() / wanted.norm())


def kernels(compiled, plan) -> Counter:
    return Counter((row.kind, row.executed) for row in executed_layers(compiled, plan, {}))


@pytest.mark.parametrize(("weight", "activation"), [(8, 8), (4, 8), (8, 4), (3, 6)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_all_but_the_16_bit_ends_run_as_integers(weight, activation, symmetric, calibrated):
    network, x = calibrated(
        weight_bits=weight, activation_bits=activation, weight_symmetric=symmetric, activation_symmetric=True
    )
    plan = integer_plan(network)
    compiled = engine(network, plan)
    assert error(compiled(x), network(x)) < 0.02  # ties that fall to the other side
    rows = executed_layers(compiled.compiled((x,)), plan, {})
    assert [row.layer for row in rows if row.executed == "float"] == ["first", "last"]
    assert {row.reason for row in rows if row.executed == "float"} == {"16-bit input"}


def test_a_single_layer_is_exact(calibrated):
    network, x = calibrated()
    plan = integer_plan(network)
    plain = deployable(network, plan)
    h = torch.randn(2, 16, 9, 9)
    for name in ("second", "grouped"):
        layer = plain.network.get_submodule(name)
        compiled = OpenVINONetwork(layer, threads=1, try_first=False)
        assert error(compiled(h), network.get_submodule(name)(h)) < 1e-6, name


def test_a_split_shortcut_is_a_sum_of_integer_convolutions(split):
    network, x = split
    plan = integer_plan(network)
    assert len(plan["shortcut"].weights) == 2
    compiled = engine(network, plan)
    assert error(compiled(x), network(x)) < 0.01
    assert kernels(compiled.compiled((x,)), plan)["Conv2d", "int8"] == 1


def test_rows_of_ranges_are_an_input_of_one_model(made):
    network, x = made(bins=2, activation_symmetric=True)

    def batches():
        for row, factor in ((0, 1.0), (1, 3.0)):
            select_row(network, row)
            yield (factor * x,)

    calibrate_(network, "mse", batches())
    plan = integer_plan(network)
    compiled = engine(network, plan)
    with pytest.raises(PTQError, match="select_row"):
        compiled(x)
    for row in (0, 1):
        select_row(network, row)
        compiled.select_row(row)
        assert error(compiled(x), network(x)) < 0.02
    assert len(compiled._compiled) == 1
    (model,) = compiled._compiled.values()
    assert kernels(model, plan)["Conv2d", "int8"] == 2 and kernels(model, plan)["Linear", "int8"] == 5


def test_each_shape_is_compiled_once(calibrated):
    network, x = calibrated()
    compiled = engine(network)
    first = compiled(x)
    assert compiled(x[:2]).shape[0] == 2 and torch.equal(compiled(x), first)
    assert len(compiled._compiled) == 2


def test_an_unknown_precision_is_refused():
    with pytest.raises(ConfigError, match="runtime.precision=f16: choose one of f32, bf16"):
        OpenVINONetwork(nn.Identity(), precision="f16")


def test_a_network_that_crashes_the_compiler_is_an_error_in_a_line(calibrated, monkeypatch):
    network, x = calibrated()
    compiled = OpenVINONetwork(deployable(network, integer_plan(network)), threads=1)
    monkeypatch.setattr("ptq_exp.runtime.openvino._TRIAL", "import os; os.abort()")
    with pytest.raises(PTQError, match="OpenVINO crashes when it compiles this network: use runtime=simulate"):
        compiled(x)


PROBE = """
from ptq_exp.runtime.openvino import OpenVINONetwork
from ptq_exp.runtime.probe import saturation
made = lambda network: OpenVINONetwork(network, threads=1, try_first=False)
print(saturation(made), saturation(made, "7bit"))
"""


@pytest.mark.parametrize(("isa", "exact"), [("AVX512_CORE_VNNI", True), ("AVX2", False)])
def test_the_probe_sees_sums_that_saturate(isa, exact):
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=os.environ | {"ONEDNN_MAX_CPU_ISA": isa}, capture_output=True, text=True
    )
    as_saved, seven_bits = map(float, done.stdout.split())
    assert seven_bits == pytest.approx(1, abs=1e-6)
    assert as_saved == pytest.approx(1, abs=1e-6) if exact else 0.4 < as_saved < 0.6


def test_share_of_the_multiplications():
    rows = [Executed("a", "Conv2d", "int8", "", 30.0), Executed("b", "Conv2d", "float", "", 10.0),
            Executed("c", "Attention", "int8", "", 60.0)]  # fmt: skip
    assert int8_share(rows) == 0.9 and int8_share(rows, ["Conv2d"]) == 0.75 and int8_share([]) == 0.0
