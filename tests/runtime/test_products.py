"""Products of activations in modules of other classes than diffusers' `Attention`, executed by runtimes."""

import pytest
import torch
from small_transformers import built, call_of

from ptq_exp.quantization import Policy, Widths, calibrate_, quantize_, select_row
from ptq_exp.runtime.deployable import deployable
from ptq_exp.runtime.export import export_network
from ptq_exp.runtime.openvino import OpenVINO
from ptq_exp.runtime.plan import FLOAT, INT8, integer_plan
from ptq_exp.runtime.torch_int8 import TorchInt8


def network_of(name, widths=None, bins=1, **settings):
    """(quantized network, report) with ranges found on two samples; each of several bins on twice as large ones."""
    network, call = built(name), call_of(name, 2)
    rules = Policy(first=(), last=(), **settings).rules(widths or Widths(8, 8, boundary=8), bins)
    report = quantize_(network, rules, call_of(name))

    def batches():
        for row in range(bins):
            if bins > 1:
                select_row(network, row)
            yield ((row + 1) * call[0], *call[1:])

    calibrate_(network, "minmax", batches())
    return network, report


@torch.no_grad()
def error(module, network, call) -> float:
    found, wanted = (net(*call[:2], **call[2]) for net in (module, network))
    return float((found - wanted).norm() / wanted.norm())


def plans_of(network) -> dict[str, tuple[str, str]]:
    return {name: (entry.executed, entry.reason) for name, entry in integer_plan(network).items()
            if entry.kind == "Product"}


def test_what_is_planned_says_why():
    symmetric = plans_of(network_of("flux", qkv_symmetric=True)[0])
    assert set(symmetric.values()) == {(INT8, "")} and len(symmetric) == 4
    assert set(plans_of(network_of("flux")[0]).values()) == {(FLOAT, "an operand is asymmetric")}
    wide = plans_of(network_of("flux", Widths(8, 8, softmax=12), qkv_symmetric=True)[0])
    assert {name.rpartition(".")[2]: plan for name, plan in wide.items()} == {
        "qk": (INT8, ""), "av": (FLOAT, "an operand has more than 8 bits")}
    rows = plans_of(network_of("flux", bins=2, qkv_symmetric=True)[0])
    assert set(rows.values()) == {(FLOAT, "its ranges change between sampling steps")}


@pytest.mark.parametrize("name", ["sd3", "flux", "sana"])
def test_torch_multiplies_them_in_float_on_quantized_operands(name):
    network, report = network_of(name, qkv_symmetric=True)
    runtime, call = TorchInt8(weights="7bit"), call_of(name, 2)
    made = runtime.compile(network, call_of(name))
    assert error(made, network, call) < 0.03  # weights of 7 bits
    products = [layer for layer in runtime.account() if layer.is_product]
    assert [(layer.layer, layer.kind) for layer in products] == [
        (row.name, row.type) for row in report.rows if row.scope == "attention"]
    assert {layer.reason for layer in products} == {"torch has no integer product of two activations"}


@torch.no_grad()
def test_rows_of_ranges_follow_the_last_input():
    network, _ = network_of("sd3", bins=2)
    plain = deployable(network, integer_plan(network))
    x, t, conditions = call_of("sd3", 2)
    plain.condition_names = tuple(conditions)
    answers = []
    for row in (0, 1):
        select_row(network, row)
        answers.append(plain(x, t, *conditions.values(), torch.tensor([row])))
        wanted = network(x, t, **conditions)
        assert float((answers[-1] - wanted).norm() / wanted.norm()) < 1e-3
    assert not torch.allclose(*answers)


def test_openvino_multiplies_them_as_integers():
    pytest.importorskip("openvino")
    network, _ = network_of("flux", qkv_symmetric=True)
    runtime = OpenVINO(weights="7bit")
    made = runtime.compile(network, call_of("flux"))
    assert error(made, network, call_of("flux")) < 0.03  # weights of 7 bits
    execution = runtime.account()
    assert execution.attention_int8_share == 1.0 and execution.int8_share == 1.0


def test_onnx_files_have_them_as_integers(tmp_path):
    """OpenVINO chooses kernels in float for the two products of SANA's linear attention, and says so."""
    pytest.importorskip("onnxruntime")
    network, _ = network_of("sana", qkv_symmetric=True)
    written = export_network(network, call_of("sana", 2), call_of("sana"), tmp_path / "model.onnx")
    assert set(written.errors) == {"onnxruntime", "openvino"} and max(written.errors.values()) < 0.01
    products = {layer.layer.rpartition(".")[2]: layer for layer in written.layers if layer.is_product}
    assert {name: layer.executed for name, layer in products.items()} == {
        "qk": INT8, "av": INT8, "product": FLOAT, "product_2": FLOAT}
    assert written.layers.int8_share == 1 and products["product"].reason == "the engine chose a float kernel"
