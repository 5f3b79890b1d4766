"""Weights and activations in number formats: placed, calibrated, proven, reported, saved and loaded."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ptq_exp.errors import ConfigError, DataError, QuantizationError
from ptq_exp.quantization import (
    ActivationQuantizer,
    Policy,
    QuantSpec,
    Rule,
    TensorSpec,
    Widths,
    calibrate_,
    calibrate_weights_,
    calibrating,
    finish_calibration,
    group_bits,
    load_quantized_,
    proven,
    quantize_,
    quantizers,
    refuted,
    save_quantized,
    select_row,
    with_groups,
)
from ptq_exp.quantization import save as save_module
from ptq_exp.quantization.formats import FORMATS
from ptq_exp.quantization.plain_rules import rule_from_dict, rule_to_dict
from ptq_exp.quantization.quantizer.formats import format_of
from ptq_exp.quantization.stored import range_arrays, restore_ranges_

PAIRS = [
    ("mxfp8_e4m3", "mxfp8_e4m3"), ("mxfp4", "mxfp4"), ("nvfp4", "nvfp4"), ("fp8_e4m3fn", "fp8_e4m3fn"), ("nvfp4", 8),
    ("codebook4", 8), ("int4_g32", "fp6_e3m2"), ("mxint8", "mxint8"), ("nf4", 16), (4, 16),
]


class Tiny(nn.Module):
    """A convolution, linear layers and attention, with a first and a last layer that the rules know."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.conv = nn.Conv2d(1, 40, 3, padding=1), nn.Conv2d(40, 24, 3, padding=1)
        self.to_q, self.to_k, self.to_v = (nn.Linear(24, 16) for _ in range(3))
        self.conv_out = nn.Linear(16, 4)

    def forward(self, x):
        h = self.conv(nn.functional.silu(self.conv_in(x))).flatten(2).transpose(1, 2)
        q, k, v = (layer(h) for layer in (self.to_q, self.to_k, self.to_v))
        return self.conv_out(nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return Tiny()


@pytest.fixture
def x():
    return torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def quantized(network, weight, activation, inputs, example, metric="minmax", **policy):
    rules = Policy(**policy).rules(Widths(weight, activation))
    report = quantize_(network, rules, example)
    calibrate_(network, metric, [inputs])
    return rules, report


@pytest.mark.parametrize(("weight", "activation"), PAIRS)
def test_a_network_is_proven_and_comes_back_bit_for_bit(weight, activation, tiny, x, tmp_path):
    check_round_trip(weight, activation, tiny, (x,), (x[:1],), tmp_path)


def test_so_does_one_of_diffusers(unet, batch, example, tmp_path):
    check_round_trip("nvfp4", "mxfp8_e4m3", unet, batch, example, tmp_path)


def check_round_trip(weight, activation, network, inputs, example, folder):
    full = copy.deepcopy(network)
    rules, report = quantized(network, weight, activation, inputs, example)
    assert refuted(report, proven(network, report, inputs)) == []
    assert report.totals["coverage"]["everything"] == (1 if activation != 16 else 0)
    expected, unquantized = answer(network, inputs), answer(full, inputs)
    assert 0 < float((expected - unquantized).norm() / unquantized.norm()) < 0.6
    description = save_quantized(folder, network, rules, report, {})
    assert description["version"] == (2 if isinstance(weight, int) else 3)
    other = copy.deepcopy(full)
    for parameter in other.parameters():
        nn.init.constant_(parameter, 0.5)
    again = load_quantized_(other, folder, example)
    assert torch.equal(answer(other, inputs), expected) and again.totals == report.totals
    third = copy.deepcopy(full)
    quantize_(third, rules, example)
    restore_ranges_(third, range_arrays(network))
    assert torch.equal(answer(third, inputs), expected)


@torch.no_grad()
def answer(network, inputs):
    found = network(*inputs)
    return getattr(found, "sample", found)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "int4_g32", "codebook4"])
def test_files_hold_codes_and_scales_at_the_reported_size(name, tiny, x, tmp_path):
    rules, report = quantized(tiny, name, 16, (x,), (x[:1],))
    description = save_quantized(tmp_path, tiny, rules, report, {})
    tensors = load_file(tmp_path / "quantized.safetensors")
    shape, prefix = tiny.conv.weight.shape, "conv."
    assert tensors[f"{prefix}weight"].shape == (shape.numel() * 4 // 8,)
    own = {key: value for key, value in tensors.items() if key.startswith(f"{prefix}weight_quantizer.")}
    scales = {key.rpartition(".")[2]: list(value.shape) for key, value in own.items() if not key.endswith(".scale")}
    blocks = {"mxfp4": [24, 3, 3, 2], "nvfp4": [24, 3, 3, 3], "int4_g32": [24, 3, 3, 2]}
    assert scales.get("block_scale") == blocks.get(name) and (scales.get("levels") == [24, 16]) == (name == "codebook4")
    size = sum(value.numel() * value.element_size() for value in own.values()) + shape.numel() / 2
    (row,) = [row for row in report.rows if row.name == "conv"]
    assert row.quantized_bytes == size - 4 and row.weight_format == name  # without the scale 1 that all quantizers have
    quantizer_count = len(description["quantizers"])
    file = description["file"]
    assert 0 <= file["bytes"] - file["header_bytes"] - file["theoretical_bytes"] <= 12 * quantizer_count


def test_an_older_reader_refuses_the_version_and_reads_all_others(tiny, x, tmp_path, monkeypatch):
    rules, report = quantized(tiny, "mxfp4", 16, (x,), (x[:1],))
    save_quantized(tmp_path, tiny, rules, report, {})
    monkeypatch.setattr(save_module, "_RESTORE", {1: None, 2: None})
    with pytest.raises(DataError, match="has version 3 of the format, this code reads 1, 2: install the ptq-exp"):
        load_quantized_(tiny, tmp_path, (x[:1],))


def test_damaged_scales_are_refused(tiny, x, tmp_path):
    rules, report = quantized(tiny, "int4_g32", 16, (x,), (x[:1],))
    tiny.conv.weight_quantizer.block_scale[0, 0, 0, 0] = torch.inf
    with pytest.raises(QuantizationError, match="not on the grid"):
        save_quantized(tmp_path, tiny, rules, report, {})


def test_blocks_of_a_convolution_lie_along_its_input_channels():
    torch.manual_seed(0)
    conv, made = nn.Conv2d(48, 4, 3), FORMATS["mxfp4"]
    full, x = conv.weight.detach().clone(), torch.randn(2, 48, 5, 5)
    network = nn.Sequential(conv)
    quantize_(network, [Rule("*", QuantSpec(TensorSpec("mxfp4"), TensorSpec("mxfp4")))], (x[:1],))
    calibrate_(network, "minmax", [])  # there is nothing to calibrate
    weight = made.fake_quantize(full.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert torch.equal(conv.weight, weight) and conv.weight_quantizer.block_scale.shape == (4, 3, 3, 2)
    pixels = made.fake_quantize(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    with torch.no_grad():
        assert torch.allclose(network(x), nn.functional.conv2d(pixels, weight, conv.bias), atol=1e-6)
        assert torch.equal(conv.input_quantizer(x)[:1], conv.input_quantizer(x[:1]))  # whatever else is in the batch


def test_the_scale_of_an_nvfp4_activation_is_calibrated_and_the_same_for_every_batch():
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Linear(40, 8)), torch.randn(6, 40)
    quantize_(network, [Rule("*", QuantSpec(TensorSpec("nvfp4"), TensorSpec("nvfp4", headroom=2.0)))], (x[:1],))
    calibrate_weights_(network, "minmax")
    with pytest.raises(QuantizationError, match="saw no data"):
        finish_calibration(network, "minmax")
    with calibrating(network):
        network(x)
    finish_calibration(network, "minmax")
    quantizer = network[0].input_quantizer
    assert float(quantizer.scale) == 2 * float(x.abs().max() / (6 * 448))
    assert torch.equal(quantizer(x)[:1], quantizer(x[:1]))
    made = FORMATS["nvfp4"]
    assert torch.equal(quantizer(x), made.fake_quantize(x, quantizer.scale.reshape(())))


@pytest.mark.parametrize("metric", ["minmax", "mse", "kl", "percentile"])
def test_scales_of_floating_point_formats(metric):
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Linear(64, 8)), torch.randn(500, 64)
    full = network[0].weight.detach().clone()
    rule = QuantSpec(TensorSpec("fp4_e2m1", granularity=Policy().granularity), TensorSpec("fp4_e2m1"))
    quantize_(network, [Rule("*", rule)], (x[:1],))
    calibrate_(network, metric, [(x,)])
    weight, read = network[0].weight_quantizer, network[0].input_quantizer
    assert weight.scale.shape == (8, 1) and bool((read.scale > 0).all())
    whole = full.abs().amax(1, keepdim=True) / 6
    made = FORMATS["fp4_e2m1"]
    error, plain = (float((made.cast(full / s) * s - full).square().sum()) for s in (weight.scale, whole))
    if metric in ("mse", "kl"):  # of kl, which is no mean over values, mse stands in
        assert error < 0.95 * plain and float(read.scale) < float(x.abs().max() / 6)
        assert float((read(x) - x).square().mean()) < float((made.cast(x / 0.75) * 0.75 - x).square().mean())
    elif metric == "minmax":
        assert torch.equal(weight.scale, whole) and float(read.scale) == float(x.abs().max() / 6)


def test_bins_of_steps_have_scales_of_their_own_where_they_are_calibrated():
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 4)), torch.randn(6, 32)
    rules = [Rule("0", QuantSpec(TensorSpec(8), TensorSpec("fp8_e4m3fn", bins=2))),
             Rule("1", QuantSpec(TensorSpec(8), TensorSpec("mxfp4", bins=2)))]
    quantize_(network, rules, (x[:1],))
    calibrate_weights_(network, "minmax")
    for row in range(2):
        select_row(network, row)
        with calibrating(network):
            network(x * (1 + row))
        finish_calibration(network, "minmax")
    first, second = (layer.input_quantizer for layer in network)
    assert first.scale.tolist() == [[float(x.abs().max() / 448)], [float(2 * x.abs().max() / 448)]]
    assert second.step is None and second.scale.shape == (1, 1)


def test_the_proof_sees_values_that_left_the_grid(tiny, x):
    _, report = quantized(tiny, "mxfp4", "mxfp4", (x,), (x[:1],))
    tiny.conv.input_quantizer.register_forward_hook(lambda _, args, output: output * 1.01)
    left = refuted(report, proven(tiny, report, (x,)))
    assert [row.name for row in left] == ["conv"] and "does not lie on the grid" in left[0].reason


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "fp8_e4m3fn", "int4_g32"])
def test_networks_in_bfloat16(name, tiny, x):
    network, x = tiny.to(torch.bfloat16), x.bfloat16()
    _, report = quantized(network, name, name, (x,), (x[:1],))
    assert refuted(report, proven(network, report, (x,))) == []
    for _, layer in network.named_modules():
        if format_of(getattr(layer, "weight_quantizer", None)):
            codes = layer.weight_quantizer.integers(layer.weight)
            weight = layer.weight.detach().clone()
            layer.weight_quantizer.restore(layer.weight, codes)
            assert torch.equal(layer.weight, weight)


def test_the_first_and_last_layers_keep_integers_where_those_are_wider(unet, example):
    quantize_(unet, Policy().rules(Widths("nvfp4", "nvfp4")), example)
    conv_in, inner = unet.conv_in, unet.mid_block.resnets[0].conv1
    assert (conv_in.weight_quantizer.bits, conv_in.input_quantizer.bits) == (8, 16)
    assert not format_of(conv_in.weight_quantizer) and not format_of(conv_in.input_quantizer)
    assert format_of(inner.weight_quantizer) == format_of(inner.input_quantizer) == "nvfp4"
    (rule, *_) = Policy().rules(Widths("fp8_e4m3fn", "fp8_e5m2", boundary=8))
    assert (rule.spec.weight.bits, rule.spec.input.bits) == ("fp8_e4m3fn", "fp8_e5m2")


def test_activations_at_16_bits_are_not_quantized(unet, example):
    report = quantize_(unet, Policy().rules(Widths(4, 16)), example)
    assert not [name for name, quantizer in quantizers(unet) if isinstance(quantizer, ActivationQuantizer)]
    rows = [row for row in report.rows if row.scope == "conv_linear"]
    assert {(row.activation_bits, row.weight_bits) for row in rows} == {(None, 8), (None, 4)}


def test_the_report_names_formats_and_counts_their_bits(tiny, x):
    _, report = quantized(tiny, "nvfp4", "mxfp8_e4m3", (x,), (x[:1],))
    (row,) = [row for row in report.rows if row.name == "conv"]
    assert (row.weight_bits, row.activation_bits, row.bops) == (4, 8, 32 * row.macs)
    assert row.quantized_bytes == row.quantized_params / 2 + 24 * 9 * 3 + 4  # 40 channels: three blocks
    layers = {layer["name"]: layer for layer in json.loads(json.dumps(report.to_dict()))["layers"]}
    assert layers[row.name]["weight_format"] == "nvfp4" and layers[row.name]["activation_format"] == "mxfp8_e4m3"
    assert "weight_format" not in layers["conv_in"]
    assert 4.5 < report.totals["bits_per_weight"] < 5 and "nvfp4 mxfp8_e4m3" in report.summary()


def test_rules_with_formats_are_plain_values():
    for rule in Policy().rules(Widths("nvfp4", "mxfp8_e4m3")):
        assert rule_from_dict(json.loads(json.dumps(rule_to_dict(rule)))) == rule


def test_groups_of_layers_have_formats_of_their_own():
    rules = Policy(first=(), last=()).rules(Widths(4, "mxfp8_e4m3"))
    groups = {"g": ("a*", *group_bits("g", "nvfp4:8")), "h": ("b*", *group_bits("h", "nf4:16"))}
    made = {rule.pattern: rule.spec for rule in with_groups(rules, groups, ["a", "b", "c"], [])}
    assert (made["a"].weight.bits, made["a"].input.bits, made["a"].product.bits) == ("nvfp4", 8, 8)
    assert made["b"].weight.bits == "nf4" and made["b"].input is made["b"].product is made["b"].softmax is None


@pytest.mark.parametrize(("bits", "expected"), [
    ("w4a8", (4, 8)), ("w4a16", (4, 16)), ("mxfp4", ("mxfp4", "mxfp4")), ("nvfp4:8", ("nvfp4", 8)),
    ("4:mxfp4", (4, "mxfp4")),
])
def test_words_for_groups(bits, expected):
    assert group_bits("bits.groups.a", bits) == expected


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Widths("mxfp5", 8), "bits.weight=mxfp5: choose 2..8, or one of fp8_e4m3fn"),
    (lambda: Widths(8, "codebook4"), "bits.activation=codebook4, which is a format of weights alone: choose 2..8, 16"),
    (lambda: Widths(16, 8), "bits.weight=16: choose 2..8"),
    (lambda: Widths(8, 12), "bits.activation=12: choose 2..8"),
    (lambda: QuantSpec(softmax=TensorSpec("mxfp4", symmetric=True)), "the softmax map takes integers alone"),
    (lambda: QuantSpec(input=TensorSpec("codebook4")), "a format of weights alone"),
    (lambda: TensorSpec("int9"), "TensorSpec.bits=int9"),
    (lambda: group_bits("bits.groups.a", "nf5"), "bits.groups.a=nf5: give a weight and an activation width"),
    (lambda: group_bits("bits.groups.a", "codebook4"), "codebook4, which is a format of weights alone"),
    (lambda: group_bits("bits.groups.a", 8), "bits.groups.a=8: give a weight and an activation width, such as w4a8"),
])
def test_impossible_formats_are_refused_by_name(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_nan_of_activations_is_seen(tiny, x):
    quantized(tiny, "fp4_e2m1", "fp4_e2m1", (x,), (x[:1],))
    x[0, 0, 0, 0] = torch.nan
    assert bool(answer(tiny, (x,))[0].isnan().any())
