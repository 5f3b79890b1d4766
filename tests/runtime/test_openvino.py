"""Networks executed by OpenVINO: 8-bit kernels where the plan says so, and the numbers of the simulation."""

import os
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch

import ptq_exp
from ptq_exp.errors import ConfigError, PTQError, QuantizationError
from ptq_exp.quantization import calibrate_, select_row
from ptq_exp.runtime import ExecutedLayer, Execution, runtime_of
from ptq_exp.runtime.deployable import deployable
from ptq_exp.runtime.openvino import CompiledNetwork, OpenVINO
from ptq_exp.runtime.plan import integer_plan

GOLDEN = Path(__file__).parents[1] / "golden" / "saved_model_1.zip"


def compiled(network, x, **options):
    """The runtime and the network that it made, without the trial in a process of its own."""
    runtime = OpenVINO(threads=1, **options)
    made = runtime.compile(network, (x[:1],))
    made._try_first = False
    return runtime, made


def error(found, wanted) -> float:
    return float((found - wanted).norm() / wanted.norm())


def kinds(runtime) -> Counter:
    return Counter((row.kind, row.executed) for row in runtime.account())


@pytest.mark.parametrize(("weight", "activation"), [(8, 8), (4, 8), (8, 4), (3, 6)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_all_but_the_16_bit_ends_run_as_integers(weight, activation, symmetric, calibrated):
    network, x = calibrated(
        weight_bits=weight, activation_bits=activation, weight_symmetric=symmetric, activation_symmetric=True
    )
    runtime, made = compiled(network, x)
    assert error(made(x), network(x)) < 0.02  # ties that fall to the other side
    rows = {row.layer: row for row in runtime.account()}
    assert [name for name, row in rows.items() if row.executed == "float"] == ["first", "last"]
    assert rows["first"].reason == "16-bit input" and not rows["second"].reason
    assert {"attention.qk", "attention.av", "attention.to_q", "grouped", "sequence"} <= set(rows)
    assert runtime.account().int8_share > 0.7 and runtime.account().attention_int8_share == 1


def test_asymmetric_operands_of_attention_stay_in_float_and_say_so(calibrated):
    network, x = calibrated()
    runtime, made = compiled(network, x)
    assert error(made(x), network(x)) < 0.02
    reasons = {row.layer: row.reason for row in runtime.account() if row.executed == "float"}
    assert reasons["attention.qk"] == reasons["attention.av"]
    assert reasons["attention.qk"].startswith("q, k or v is asymmetric") and set(reasons) == {
        "first", "last", "attention.qk", "attention.av"
    }


def test_a_single_layer_is_exact(calibrated):
    network, _ = calibrated()
    plain, h = deployable(network, integer_plan(network)), torch.randn(2, 16, 9, 9)
    for name in ("second", "grouped"):
        made = CompiledNetwork(plain.network.get_submodule(name), threads=1, try_first=False)
        assert error(made(h), network.get_submodule(name)(h)) < 1e-6, name


def test_a_split_shortcut_is_a_sum_of_integer_convolutions(split):
    network, x = split
    assert len(integer_plan(network)["shortcut"].weights) == 2
    runtime, made = compiled(network, x)
    assert error(made(x), network(x)) < 0.01
    assert kinds(runtime)["Conv2d", "int8"] == 1


def test_rows_of_ranges_are_an_input_of_one_model(made):
    network, x = made(bins=2, activation_symmetric=True)

    def batches():
        for row, factor in ((0, 1.0), (1, 3.0)):
            select_row(network, row)
            yield (factor * x,)

    calibrate_(network, "mse", batches())
    network.second.input_quantizer.step.is_set = False
    runtime, engine = compiled(network, x)
    with pytest.raises(QuantizationError, match="call select_row first"):
        engine(x)
    for row in (0, 1):
        select_row(engine, row)  # the step that it shares with the network
        assert error(engine(x), network(x)) < 0.02
    assert len(engine._models) == 1
    assert kinds(runtime)["Conv2d", "int8"] == 2 and kinds(runtime)["Linear", "int8"] == 5


def test_each_shape_is_compiled_once(calibrated):
    network, x = calibrated()
    _, made = compiled(network, x)
    first = made(x)
    assert made(x[:2]).shape[0] == 2 and torch.equal(made(x), first)
    assert len(made._models) == 2


def test_without_openvino_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'ptq-exp\[openvino\]'"):
        runtime_of("openvino")


def test_a_network_that_crashes_the_compiler_is_an_error_in_a_line(calibrated, monkeypatch):
    network, x = calibrated()
    _, made = compiled(network, x)
    made._try_first = True
    monkeypatch.setattr("ptq_exp.runtime.compilation._TRIAL", "import os; os.abort()")
    with pytest.raises(PTQError, match="OpenVINO crashes when it compiles this network: use runtime=simulate"):
        made(x)


PROBE = """
import sys
sys.modules["openvino_telemetry"] = None
from ptq_exp.runtime.openvino import CompiledNetwork
from ptq_exp.runtime.probe import check_sums, saturation
made = lambda network: CompiledNetwork(network, threads=1, try_first=False)
print(saturation(made), saturation(made, "7bit"))
check_sums(made)
"""


@pytest.mark.parametrize(("isa", "exact"), [("AVX512_CORE_VNNI", True), ("AVX2", False)])
def test_the_probe_sees_sums_that_saturate(isa, exact):
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=os.environ | {"ONEDNN_MAX_CPU_ISA": isa}, capture_output=True, text=True,
        check=False,
    )
    as_saved, seven_bits = map(float, done.stdout.split())
    assert seven_bits == pytest.approx(1, abs=1e-6)
    if exact:
        assert as_saved == pytest.approx(1, abs=1e-6) and done.returncode == 0
    else:
        assert 0.4 < as_saved < 0.6 and "8-bit sums saturate on this processor" in done.stderr
        assert "choose runtime.weights=7bit, or runtime=simulate" in done.stderr


def test_a_saved_model_is_drawn_by_the_engine(tmp_path):
    with zipfile.ZipFile(GOLDEN) as archive:
        archive.extractall(tmp_path)
    simulated, engine = (
        ptq_exp.load_quantized(tmp_path / "quantized", checkpoint=str(tmp_path / "model"), runtime=name)
        for name in ("simulate", "openvino")
    )
    x = torch.randn(2, *simulated.model.example_inputs().x.shape[1:])
    t = simulated.grid.network_time(torch.tensor([0, 0]))
    with torch.no_grad():
        assert error(engine.denoiser(x, t), simulated.denoiser(x, t)) < 0.02
    left = {row.layer: row.reason for row in engine.runtime.account() if row.executed == "float"}
    assert set(left.values()) == {"16-bit input", "q, k or v is asymmetric"}
    assert engine.runtime.account().int8_share > 0.85 and engine.runtime.account().attention_int8_share == 0


def test_share_of_the_multiplications():
    rows = [ExecutedLayer("a", "Conv2d", "int8", "", 90, ""), ExecutedLayer("b", "Conv2d", "float", "", 10, "")]
    assert Execution(rows).int8_share == 0.9 and Execution(rows).attention_int8_share is None
    rows.append(ExecutedLayer("a.qk", "Attention.qk", "float", "", 50, ""))
    assert Execution(rows).int8_share == 0.9 and Execution(rows).attention_int8_share == 0
    assert Execution().int8_share == 0



@pytest.mark.parametrize(("cores", "threads", "bound"), [({0, 1}, 2, True), ({0, 1}, 1, False), ({3}, 1, False),
                                                         ({0, 1, 2}, 2, False), ({0, 1}, 3, False)])
def test_threads_are_bound_to_cores_where_they_take_all_of_them(monkeypatch, cores, threads, bound):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: cores, raising=False)
    made = CompiledNetwork(torch.nn.Linear(3, 2), threads=threads, try_first=False)
    assert made._settings["ENABLE_CPU_PINNING"] is bound
    monkeypatch.delattr(os, "sched_getaffinity")  # other systems than Linux
    assert CompiledNetwork(torch.nn.Linear(3, 2), threads=threads)._settings["ENABLE_CPU_PINNING"] is False


def test_bound_threads_compute_the_same():
    network, x = torch.nn.Linear(64, 8), torch.randn(5, 64)
    found = []
    for bound in (True, False):
        made = CompiledNetwork(network, threads=2, try_first=False)
        made._settings["ENABLE_CPU_PINNING"] = bound
        found.append(made(x))
    assert torch.equal(*found) and error(found[0], network(x)) < 1e-5
