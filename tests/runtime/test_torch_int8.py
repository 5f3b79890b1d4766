"""Layers on torch's own 8-bit operators: exact against the simulation on the same input, and said as they are."""

import copy
import os
import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from small_networks import use_few_candidate_ranges
from torch import nn

from ptq_exp.errors import ConfigError, QuantizationError
from ptq_exp.quantization import Policy, Widths, calibrate_, quantize_, select_row
from ptq_exp.runtime import runtime_of
from ptq_exp.runtime.plain_layers import IntegerLayer
from ptq_exp.runtime.torch_int8 import integer_network
from ptq_exp.runtime.torch_kernels import IntMMLayer, OneDNNLayer

KINDS = [OneDNNLayer, IntMMLayer]
TIE = 1e-4
"""Distance of x / scale from the middle between two levels within which a rounding may fall either way."""


def error(found, wanted) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))


def near_a_tie(layer, x) -> bool:
    scale, *_ = layer.input_quantizer.cells(x, None)
    ratio = x / scale
    return bool(((ratio - ratio.floor() - 0.5).abs() < TIE).any())


def errors_of_layers(network, made, call) -> dict[str, float]:
    """Relative error of integer layers on the inputs that they have in the simulation, where none is near a tie."""
    inputs, handles = {}, []
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear):
            keep = partial(inputs.__setitem__, name)
            handles.append(layer.register_forward_hook(lambda module, x, y, keep=keep: keep((x[0], y))))
    with torch.no_grad():
        network(*call)
    for handle in handles:
        handle.remove()
    found = {}
    for name, (x, y) in inputs.items():
        layer, simulated = made.plain.network.get_submodule(name), network.get_submodule(name)
        if not isinstance(layer, IntegerLayer):
            continue
        if name.endswith(("to_q", "to_k", "to_v")):  # their outputs are quantized on the heads
            quantizer, simulated.output_quantizer = simulated.output_quantizer, nn.Identity()
            y, simulated.output_quantizer = simulated(x), quantizer
        if not near_a_tie(simulated, x):
            found[name] = error(layer(x), y)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("weight", "activation"), [(8, 8), (4, 8), (8, 4), (3, 6)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_layer_agrees_on_the_same_input(kind, weight, activation, symmetric, calibrated):
    network, x = calibrated(weight_bits=weight, activation_bits=activation, weight_symmetric=symmetric)
    made, _ = integer_network(network, kind)
    found = errors_of_layers(network, made, (x[:2, :, :4, :4],))
    assert len(found) >= (4 if kind is OneDNNLayer else 2) and max(found.values()) < 1e-5, found
    assert error(made(x), network(x)) < 0.03


def unet():
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, norm_num_groups=4, resnet_time_scale_shift="scale_shift",
    ), (torch.randn(2, 1, 8, 8), torch.tensor([20.0, 800.0]))


def dit():
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        num_embeds_ada_norm=10,
    ), (torch.randn(2, 4, 8, 8), torch.tensor([20, 800]), torch.tensor([1, 7]))


class Positional(nn.Module):
    """A network of diffusers whose answer is a tensor."""

    def __init__(self, network, names) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, *call):
        return self.network(**dict(zip(self.names, call, strict=True)), return_dict=False)[0]


@pytest.mark.parametrize(
    ("build", "names", "ends"),
    [
        (unet, ("sample", "timestep"), {"first": ("*conv_in",), "last": ("*conv_out",)}),
        (dit, ("hidden_states", "timestep", "class_labels"), {"first": ("*pos_embed.proj",), "last": ("*proj_out_2",)}),
    ],
)
def test_networks_of_both_families(build, names, ends, monkeypatch):
    use_few_candidate_ranges(monkeypatch)
    torch.manual_seed(0)
    network, call = build()
    network = Positional(network, names).eval().requires_grad_(False)
    example = tuple(part[:1] for part in call)
    quantize_(network, Policy(qkv_symmetric=True, **ends).rules(Widths(8, 8)), example)
    calibrate_(network, "mse", [call])
    wanted = network(*call)
    for kind in KINDS:
        made, _ = integer_network(network, kind)
        found = errors_of_layers(network, made, example)
        assert len(found) > 8 and max(found.values()) < 1e-5, (kind, found)
        assert made(*call).shape == wanted.shape and error(made(*call), wanted) < 0.05


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_bias_is_part_of_the_state_whoever_adds_it(symmetric, calibrated):
    network, x = calibrated(weight_bits=8, activation_bits=8, weight_symmetric=symmetric)
    made, _ = integer_network(network, OneDNNLayer)
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
            state = made.plain.network.get_submodule(name).state_dict()
            (bias,) = (value for key, value in state.items() if key.endswith("bias"))
            assert torch.equal(bias.flatten(), layer.bias)


def test_a_network_that_was_used_is_copied_and_written(calibrated):
    network, x = calibrated()
    made, _ = integer_network(network, OneDNNLayer)
    wanted = made(x)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made.plain.network))):
        assert torch.equal(other(x), wanted)
    assert torch.equal(made(x), wanted)


def test_a_split_shortcut_is_a_sum_of_integer_convolutions(split):
    network, x = split
    made, _ = integer_network(network, OneDNNLayer)
    assert len(made.plain.network.shortcut.parts) == 2
    assert error(made(x), network(x)) < 0.01


def test_rows_of_ranges_follow_the_step(made):
    network, x = made(bins=2)

    def batches():
        for row, factor in ((0, 1.0), (1, 3.0)):
            select_row(network, row)
            yield (factor * x,)

    calibrate_(network, "mse", batches())
    network.second.input_quantizer.step.is_set = False
    engine = runtime_of("torch").compile(network, (x[:1],))
    with pytest.raises(QuantizationError, match="call select_row first"):
        engine(x)
    for row in (0, 1):
        select_row(engine, row)
        assert error(engine(x), network(x)) < 0.02


def test_what_is_executed_is_said(calibrated):
    network, x = calibrated(qkv_symmetric=True)
    runtime = runtime_of("torch")
    runtime.compile(network, (x[:1],))
    rows = {row.layer: row for row in runtime.account()}
    assert {name: row.reason for name, row in rows.items() if row.executed == "float"} == {
        "first": "16-bit input", "last": "16-bit input",
        "attention.qk": "torch has no integer product of two activations",
        "attention.av": "torch has no integer product of two activations",
    }
    assert rows["second"].kernel == "onednn qconv2d" and rows["linear"].kernel == "onednn qlinear"
    assert all(row.macs > 0 for row in rows.values())


def test_layers_that_a_gpu_has_no_kernel_for_stay_in_float(calibrated):
    network, x = calibrated()
    made, plan = integer_network(network, IntMMLayer)
    left = {name for name, entry in plan.items() if entry.reason.startswith("torch._int_mm multiplies matrices")}
    assert left == {"second", "grouped", "sequence"}
    assert error(made(x), network(x)) < 0.03


@pytest.mark.cuda
def test_a_gpu_agrees_with_the_simulation(calibrated):
    network, x = calibrated(qkv_symmetric=True)
    wanted, on_gpu = network(x), x.cuda()
    engine = runtime_of("torch").compile(network.cuda(), (on_gpu[:1],))
    assert error(engine(on_gpu).cpu(), wanted) < 0.03


def test_groups_of_input_channels_are_refused_by_the_setting_to_change(calibrated):
    network, x = calibrated(weight_bits=4, weight_granularity="group", group_size=8)
    with pytest.raises(ConfigError, match=r"^runtime=torch: second has .*or runtime.regrid=true$"):
        runtime_of("torch").compile(network, (x[:1],))
    engine = runtime_of("torch", {"regrid": True}).compile(network, (x[:1],))
    assert error(engine(x), network(x)) < 0.05


PROBE = """
from ptq_exp.runtime.plain_layers import Row
from ptq_exp.runtime.probe import check_sums, saturation
from ptq_exp.runtime.torch_kernels import OneDNNLayer
made = lambda probe: OneDNNLayer(probe.convolution, probe.plan, Row())
print(saturation(made), saturation(made, "7bit"))
check_sums(made, engine="torch")
"""


def test_sums_that_saturate_are_refused():
    """oneDNN can be told to do without the instructions that sum in 32 bits."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}, capture_output=True, text=True,
        check=False,
    )
    as_saved, seven_bits = map(float, done.stdout.split())
    assert 0.4 < as_saved < 0.6 and seven_bits == pytest.approx(1, abs=1e-6)
    assert "runtime=torch: 8-bit sums saturate on this processor" in done.stderr
