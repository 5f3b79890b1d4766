"""The account of a network: MACs, coverage, BOPs, bytes, reasons."""

import copy
import json

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ptq_exp.errors import QuantizationError
from ptq_exp.quantization import (
    PerChannel,
    Policy,
    QuantSpec,
    Rule,
    TensorSpec,
    Widths,
    calibrate_,
    describe,
    quantize_,
    quantizers,
    range_table,
)


class Tiny(nn.Module):
    """One of each layer kind, with MACs that can be counted by hand for an input ``[1, 2, 6, 6]``."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)  # 4*6*6 outputs * 2*3*3 = 2592
        self.grouped = nn.Conv2d(4, 4, 3, stride=2, groups=2, bias=False)  # 4*2*2 * 2*3*3 = 288
        self.line = nn.Conv1d(4, 6, 2)  # 6*3 * 4*2 = 144
        self.norm = nn.GroupNorm(2, 6)
        self.head = nn.Linear(6, 5)  # 3 positions * 6*5 = 90, called twice = 180
        self.deconv = nn.ConvTranspose1d(5, 2, 2)  # 5*3 inputs * 2*2 = 60

    def forward(self, x):
        x = self.norm(self.line(self.grouped(self.conv(x)).flatten(2))).transpose(1, 2)
        x = self.head(x) + self.head(input=-x)
        return self.deconv(x.transpose(1, 2)) @ torch.ones(4, 7)  # 2*4*7 = 56 in no module


MACS = {"conv": 2592, "grouped": 288, "line": 144, "head": 180, "deconv": 60, "(other)": 56}
EXAMPLE = (torch.ones(1, 2, 6, 6),)


def spec(weight_bits=8, activation_bits=4, **weight):
    return QuantSpec(TensorSpec(weight_bits, **weight), TensorSpec(activation_bits))


def test_macs_by_hand():
    report = describe(Tiny(), EXAMPLE)
    assert {row.name: row.macs for row in report.rows} == MACS
    assert report.totals["macs"] == {"conv_linear": sum(MACS.values()) - 56, "everything": sum(MACS.values())}


def test_attention_macs_by_hand():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Attention(12, cross_attention_dim=10, heads=2, dim_head=8)

        def forward(self, x, context):
            return self.attn(x, encoder_hidden_states=context)

    rows = {row.name: row for row in describe(Cross(), (torch.randn(1, 5, 12), torch.randn(1, 3, 10))).rows}
    assert rows["attn.qk"].macs == 2 * 5 * 3 * 8  # heads * queries * keys * width
    assert rows["attn.av"].macs == 2 * 5 * 3 * 8
    assert rows["attn.to_k"].macs == 3 * 10 * 16
    assert "(other)" not in rows


def test_macs_of_a_unet_agree_with_the_operator_count(unet, example):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(*example)
    report = describe(unet, example)
    assert sum(row.macs for row in report.rows) * 2 == counter.get_total_flops()
    assert {row.scope for row in report.rows} == {"conv_linear", "attention"}  # nothing in "other"


def test_a_fused_processor_set_later_is_seen(unet, example):
    quantize_(unet, Policy().rules(Widths(8, 8)), example)
    unet.mid_block.attentions[0].set_processor(AttnProcessor2_0())
    rows = {row.name: row for row in describe(unet, example).rows}
    assert rows["mid_block.attentions.0.qk"].covered
    assert rows["mid_block.attentions.0.av"].activation_bits is None


def test_totals_by_hand():
    model = Tiny()
    rules = [
        Rule("conv", spec(8, 4, granularity=PerChannel())),
        Rule("grouped", QuantSpec(weight=TensorSpec(6, symmetric=True))),
        Rule("line", None, "a reason"),
        Rule("head", spec(3, 2)),
    ]
    totals = quantize_(model, rules, EXAMPLE).totals
    bops = {
        "conv": 2592 * 32,
        "grouped": 288 * 6 * 32,
        "line": 144 * 1024,
        "head": 180 * 6,
        "deconv": 60 * 1024,
    }
    layers = sum(bops.values())
    assert totals["bops"] == {"conv_linear": layers, "everything": layers + 56 * 1024}
    assert totals["bops_fp32"]["conv_linear"] == 3264 * 1024
    assert totals["bops_reduction"]["conv_linear"] == pytest.approx(3264 * 1024 / layers)
    assert totals["coverage"]["conv_linear"] == pytest.approx((2592 + 180) / 3264)
    assert totals["coverage"]["everything"] == pytest.approx((2592 + 180) / 3320)
    size = 72 * 1 + 4 * (4 + 1) + 4 * 4  # conv: weights, a scale and a zero point per output channel, bias
    size += 72 * 6 / 8 + 4  # grouped: one scale, no zero point, no bias
    size += 4 * (48 + 6) + 4 * 12  # line in FP32, norm
    size += 30 * 3 / 8 + 5 + 4 * 5  # head
    size += 4 * (20 + 2)  # deconv
    assert totals["weight_bytes"] == pytest.approx(size)
    assert totals["params"] == sum(p.numel() for p in model.parameters())
    assert totals["fp32_bytes"] == 4 * totals["params"]


def test_every_layer_is_quantized_or_says_why_not():
    class Mine(nn.Linear):
        pass

    model = Tiny()
    model.mine, model.table = Mine(5, 5), nn.Embedding(3, 2)
    rules = [
        Rule("line", None, "too sensitive"),
        Rule("grouped", QuantSpec(weight=TensorSpec(6))),
        Rule("conv", spec()),
        Rule("table", None),
    ]
    rows = {row.name: row for row in quantize_(model, rules, EXAMPLE).rows}
    assert rows["conv"].reason == "" and (rows["conv"].weight_bits, rows["conv"].activation_bits) == (8, 4)
    assert rows["line"].reason == "too sensitive"
    assert rows["grouped"].reason == "no quantizer on input" and rows["grouped"].weight_bits == 6
    assert rows["head"].reason == "no rule matches"
    assert rows["mine"].reason == "left alone: Mine is a subclass of Linear"
    assert rows["deconv"].reason == "left alone: ConvTranspose1d has no quantized counterpart"
    assert rows["table"].reason == "kept by rule 'table'"
    assert "norm" not in rows
    assert all(row.reason or row.covered for row in rows.values())


def test_multihead_attention_is_listed_and_its_products_are_counted():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2)

        def forward(self, x):
            return self.attn(x, x, x)[0]

    model = Net()
    report = quantize_(model, [Rule("*", None)], (torch.randn(1, 5, 8),))
    assert {"attn", "attn.out_proj", "(outside)", "(other)"} == {row.name for row in report.rows}
    assert report.totals["coverage"]["everything"] == 0.0
    # 1 query of 1 key for each of 5 batch entries: projections 5 * 8 * 32, products 5 * 2 * 8
    assert report.totals["macs"]["everything"] == 5 * 8 * 32 + 5 * 2 * 8


def test_the_default_policy_covers_the_unet(unet, example):
    report = quantize_(unet, Policy().rules(Widths(8, 8, boundary=8)), example)
    assert report.totals["coverage"]["conv_linear"] >= 0.99
    assert report.totals["coverage"]["everything"] >= 0.99
    assert report.totals["bops_reduction"]["conv_linear"] == pytest.approx(16)
    assert not any(row.reason for row in report.rows)


def test_bits_of_attention_products(unet, example):
    operands = [
        Rule(f"*to_{role}", QuantSpec(output=TensorSpec(bits)))
        for role, bits in zip("qkv", (3, 5, 7), strict=True)
    ]
    rules = [*operands, *Policy().rules(Widths(4, 6, softmax=12))]
    rows = {row.name: row for row in quantize_(unet, rules, example).rows}
    qk, av = rows["mid_block.attentions.0.qk"], rows["mid_block.attentions.0.av"]
    assert (qk.weight_bits, qk.activation_bits) == (5, 3)
    assert (av.weight_bits, av.activation_bits) == (7, 12)
    assert av.bops == av.macs * 7 * 12


def test_attention_written_as_a_function_is_counted_by_product():
    class Fused(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

    rows = describe(Fused(), (torch.randn(1, 2, 5, 8),)).rows
    found = [(row.name, row.type, row.macs, row.covered) for row in rows]
    assert found == [(name, f"Fused.{name}", 2 * 5 * 5 * 8, False) for name in ("qk", "av")]


def test_a_quantized_model_is_described_as_when_it_was_quantized(unet, example):
    report = quantize_(unet, Policy().rules(Widths(4, 8)), example)
    assert describe(unet, example) == report


def test_describing_leaves_no_trace():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 6), nn.BatchNorm1d(6))
    model[0].eval()
    before, seed = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    describe(model, (torch.randn(1, 6, generator=torch.Generator().manual_seed(0)),))
    assert torch.equal(torch.get_rng_state(), seed)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model] == [False, True, True]
    assert not any(module._forward_hooks for module in model)


def test_the_example_is_one_sample():
    with pytest.raises(QuantizationError, match=r"one sample.*\[2\]"):
        describe(Tiny(), (torch.ones(2, 2, 6, 6),))


def test_reports_are_plain_data_and_tables(unet, example):
    report = quantize_(unet, Policy().rules(Widths(4, 8)), example)
    stored = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert stored["totals"] == report.totals and len(stored["layers"]) == len(report.rows)
    table = report.table()
    assert table["bops"].sum() == report.totals["bops"]["everything"]
    assert set(table["name"]) == {row.name for row in report.rows}


def test_the_summary_groups_operations_and_reasons(unet, example):
    rules = [Rule("mid_block.*", None, "for comparison"), *Policy().rules(Widths(4, 8, boundary=8))]
    lines = quantize_(unet, rules, example).summary().splitlines()
    # 2 of 25 convolutions are the first and the last, and the middle block has 4
    assert [line.split()[:2] for line in lines if line.startswith("Conv2d")] == [
        ["Conv2d", "2"],
        ["Conv2d", "19"],
        ["Conv2d", "4"],
    ]
    assert sum("for comparison" in line for line in lines) == 1
    assert any(line.startswith("conv + linear: 1.01 M MACs") for line in lines)


def test_ranges_that_nobody_reads_are_summed_up(monkeypatch):
    layer = nn.Sequential(nn.Linear(8, 3, bias=False))
    with torch.no_grad():
        layer[0].weight.copy_(torch.tensor([1.0, 3.0, 2.0]).view(3, 1) * torch.tensor([-1.0, 1.0] * 4))
    quantize_(layer, [Rule("*", QuantSpec(TensorSpec(2, granularity=PerChannel())))], (torch.ones(1, 8),))
    layer[0].weight_quantizer.search(layer[0].weight, "minmax")
    whole = range_table(layer)["0.weight_quantizer"]
    assert [scale for (scale,) in whole["scale"]] == pytest.approx([2 / 3, 2, 4 / 3])
    monkeypatch.setattr("ptq_exp.quantization.cost.account.MOST_NUMBERS", 2)
    found = range_table(layer)["0.weight_quantizer"]
    assert found["scale"] == pytest.approx({"numbers": 3, "min": 2 / 3, "median": 4 / 3, "max": 2})
    assert {key: value for key, value in found.items() if not isinstance(value, dict)}.keys() == {
        "bits", "symmetric", "segments"
    }


def test_ranges_are_plain_lists(unet, example, batch):
    quantize_(unet, Policy().rules(Widths(4, 8)), example)
    with pytest.raises(QuantizationError, match="not calibrated"):
        range_table(unet)
    calibrate_(unet, "minmax", [batch])
    stored = json.loads(json.dumps(range_table(unet), allow_nan=False))
    assert set(stored) == {name for name, _ in quantizers(unet)}
    weight = stored["mid_block.resnets.0.conv1.weight_quantizer"]
    assert (weight["bits"], weight["symmetric"], len(weight["scale"]), weight["qmax"][3]) == (
        4,
        False,
        16,
        [15.0],
    )
    assert len(stored["conv_in.input_quantizer"]["zero_point"]) == 1
