"""Activation quantizers after the layers: which multiplications then read a grid, and the operation study."""

import pytest
import torch
from torch import nn

from ptq_exp.errors import ConfigError
from ptq_exp.quantization import (
    Policy,
    QuantSpec,
    Rule,
    TensorSpec,
    Widths,
    calibrate_,
    describe,
    quantize_,
    quantizers,
)

METRIC = "minmax"


class Net(nn.Module):
    """x [N, 2, 4, 4]: `second` reads what `first` made, `viewed` a view of it, the others something in between."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.viewed = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3), nn.Linear(4, 3)
        self.active, self.summed, self.both = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        made = self.first(x)
        viewed = self.viewed(made.flatten(2).transpose(1, 2)).mean()
        mixed = self.both(made) + self.both(made * 2)  # once from the grid, once not
        return self.second(made).mean() + viewed + (self.active(made.relu()) + self.summed(made + made) + mixed).mean()


def test_coverage_counts_what_reads_a_grid_by_hand():
    torch.manual_seed(0)
    model, example = Net(), (torch.randn(1, 2, 4, 4),)
    rules = Policy(activation_site="output", first=(), last=(), attention=False).rules(Widths(8, 6))
    report = quantize_(model, rules, example)
    rows = {row.name: row for row in report.rows}
    assert {name for name, row in rows.items() if row.covered} == {"second", "viewed"}
    assert rows["second"].activation_bits == rows["viewed"].activation_bits == 6
    assert "no quantizer on input" in rows["active"].reason and rows["active"].weight_bits == 8
    macs = {"first": 128, "second": 4 * 4 * 36, "viewed": 16 * 12, "active": 128, "summed": 128, "both": 2 * 128}
    covered = macs["second"] + macs["viewed"]
    assert report.totals["coverage"]["conv_linear"] == pytest.approx(covered / sum(macs.values()))
    fp_input = sum(macs.values()) - covered
    assert report.totals["bops"]["conv_linear"] == covered * 8 * 6 + fp_input * 8 * 32
    assert describe(model, example).totals["coverage"] == report.totals["coverage"]
    assert {name.rpartition(".")[2] for name, _ in quantizers(model)} == {"weight_quantizer", "output_quantizer"}


def test_of_a_unet_hardly_anything_reads_a_grid(unet, example):
    report = quantize_(unet, Policy(activation_site="output").rules(Widths(8, 8)), example)
    covered = [row for row in report.rows if row.covered and row.scope == "conv_linear"]
    # the shortcut of the block behind the strided convolution
    assert [row.name for row in covered] == ["down_blocks.1.resnets.0.conv_shortcut"]
    # q, k, v and the softmax map have their own quantizers at either site
    assert all(row.covered for row in report.rows if row.scope == "attention")
    assert {name.partition(".")[0] for name, q in quantizers(unet) if "output" in name} >= {"conv_in", "time_embedding"}
    assert "conv_out.output_quantizer" not in dict(quantizers(unet))


def test_a_network_quantized_at_its_outputs_runs_on_their_grids():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.SiLU(), nn.Linear(3, 2)), torch.randn(64, 4)
    rules = Policy(activation_site="output", first=(), last=("2",), attention=False).rules(Widths(8, 2, first_last=3))
    quantize_(model, rules, (x[:1],))
    calibrate_(model, METRIC, [(x,)])
    assert len(model[0](x).unique()) == 4 and len(model(x).unique()) > 8


def test_state_and_output_can_be_quantized_for_a_study(unet, example, batch):
    plain, studied = Policy().rules(Widths(8, 4)), Policy(quantize_state=True, quantize_output=True).rules(Widths(8, 4))
    assert (plain[0].spec.input.bits, plain[0].spec.input.headroom) == (16, 2)
    assert (studied[0].spec.input.bits, studied[0].spec.input.headroom, studied[0].spec.input.metric) == (8, 1, None)
    assert plain[1].spec.output is None and studied[1].spec.output.bits == 8
    assert studied[1].spec.input == plain[1].spec.input and studied[2:] == plain[2:]
    quantize_(unet, studied, example)
    calibrate_(unet, METRIC, [batch])
    with torch.no_grad():
        assert len(unet(*batch).sample.unique()) <= 256


def test_at_the_output_site_the_state_is_quantized_on_request():
    first = Policy(activation_site="output", quantize_state=True).rules(Widths(8, 8))[0].spec
    assert first.input.bits == 8 and first.output.bits == 8
    with pytest.raises(ConfigError, match="activation_site=both: choose one of input, output"):
        Policy(activation_site="both").rules(Widths(8, 8))


def test_a_layer_with_an_own_input_quantizer_keeps_its_own_bits():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    weight = TensorSpec(8)
    rules = [Rule("0", QuantSpec(weight, None, TensorSpec(3))), Rule("1", QuantSpec(weight, TensorSpec(5)))]
    report = quantize_(model, rules, (torch.zeros(1, 4),))
    assert [row.activation_bits for row in report.rows] == [None, 5]
