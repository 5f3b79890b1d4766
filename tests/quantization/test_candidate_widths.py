"""Activations with candidate widths: ranges per row, rules, whole networks, and the account of a mixture."""

import json
from fractions import Fraction

import pytest
import torch
from small_networks import use_few_candidate_ranges

from ptq_exp.embedded import digits_model
from ptq_exp.errors import ConfigError, QuantizationError
from ptq_exp.quantization import (
    ActivationQuantizer,
    Policy,
    QRange,
    QuantSpec,
    Rule,
    TensorSpec,
    Widths,
    calibrate_,
    calibrate_activations_,
    calibrate_weights_,
    calibrating,
    describe,
    disabled,
    finish_calibration,
    quantize_,
    range_table,
    select_row,
)
from ptq_exp.quantization.specs import first_match

FIELDS = QRange._fields


def observed(bits, data, metric="minmax", **settings):
    quantizer = ActivationQuantizer(bits, **{"symmetric": False} | settings)
    for batch in data.split(5):
        quantizer.observe(batch)
    quantizer.finish(metric)
    return quantizer


# One quantizer.


def test_two_rows_by_hand():
    quantizer = observed((2, 4), torch.tensor([[-1.0, 2.0]]))
    assert quantizer.bits == quantizer.widths == (2, 4)
    # 2 bits: 4 levels over [-1, 2], scale 1, zero point 1. 4 bits: 16 levels, scale 0.2, zero point 5.
    torch.testing.assert_close(quantizer.scale, torch.tensor([[1.0], [0.2]]))
    assert quantizer.zero_point.tolist() == [[1], [5]]
    assert quantizer.qmin.tolist() == [[0], [0]] and quantizer.qmax.tolist() == [[3], [15]]
    x = torch.tensor([[-1.4, -0.31, 0.45, 0.55, 1.27, 3.0]])
    for row, expected in ((0, [-1, 0, 0, 1, 1, 2]), (1, [-1, -0.4, 0.4, 0.6, 1.2, 2]), (0, [-1, 0, 0, 1, 1, 2])):
        quantizer.step.set(row)
        torch.testing.assert_close(quantizer(x), torch.tensor([expected], dtype=torch.float32))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"metric": "mse"},
        {"metric": "kl"},
        {"metric": "percentile", "symmetric": True},
        {"headroom": 2.0},
        {"segments": (1, 3), "axis": -3},
        {"segments": (2, 2), "axis": -1, "metric": "mse", "headroom": 1.5},
    ],
    ids=str,
)
def test_each_row_is_a_quantizer_of_that_width(settings):
    data = torch.randn(12, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    both = observed((3, 4, 8), data, **settings)
    for row, bits in enumerate((3, 4, 8)):
        alone = observed(bits, data, **settings)
        assert all(torch.equal(getattr(both, field)[row], getattr(alone, field)[0]) for field in FIELDS)
        both.step.set(row)
        assert torch.equal(both(2 * data), alone(2 * data))


def test_one_candidate_is_a_plain_quantizer():
    quantizer = ActivationQuantizer((8,), symmetric=False)
    assert quantizer.bits == 8 and quantizer.step is None and quantizer.scale.shape == (1, 1)
    assert TensorSpec((8,)) == TensorSpec(8)
    assert Policy().rules(Widths(8, [8])) == Policy().rules(Widths(8, 8))


def test_off_and_observing_need_no_row(unet, example, batch):
    quantize_(unet, Policy().rules(Widths(8, (4, 8))), example)
    calibrate_weights_(unet, "minmax")
    with torch.no_grad():
        with calibrating(unet):
            unet(*batch)
        with disabled(unet):
            unet(*batch)
        finish_calibration(unet, "minmax")
        with pytest.raises(QuantizationError, match="select_row"):
            unet(*batch)


def test_a_gradient_reaches_the_scale_in_force():
    quantizer = observed((2, 4), torch.tensor([[-1.0, 2.0]]))
    quantizer.scale.requires_grad_(True)
    quantizer.step.set(1)
    quantizer(torch.tensor([[9.0]])).sum().backward()
    assert quantizer.scale.grad.tolist() == [[0], [10]]  # clamped at level 15 - 5


# Rules.


@pytest.mark.parametrize("bits", [(8, 4), (4, 4), (), (4, 17), (1, 8), (4, 8.0)])
def test_bad_candidates_are_refused(bits):
    with pytest.raises(ConfigError, match=r"TensorSpec\.bits"):
        TensorSpec(bits)


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ([8, 4], r"bits\.candidates=\[8, 4\]: give candidate widths in ascending order"),
        ([], r"bits\.candidates=\[\]"),
        ((4, 16), r"bits\.candidates=16: choose 2\.\.8"),
        (None, r"bits\.activation=None: choose 2\.\.8"),
    ],
)
def test_bad_candidates_name_the_setting(bits, message):
    with pytest.raises(ConfigError, match=message):
        Policy().rules(Widths(8, bits))


def test_a_weight_has_one_width():
    with pytest.raises(ConfigError, match=r"QuantSpec\.weight.*\(4, 8\).*one width"):
        QuantSpec(TensorSpec((4, 8)), TensorSpec(8))


def test_candidates_concern_layer_inputs_and_q_k_v():
    rules = Policy().rules(Widths(4, [4, 8], softmax=8, boundary=2, first_last=6))
    edge, q, other = (first_match(rules, name).spec for name in ("conv_in", "attn.to_q", "attn"))
    assert (edge.weight.bits, edge.input.bits) == (6, 8)
    assert (q.weight.bits, q.input.bits, q.output.bits) == (4, (4, 8), (4, 8))
    assert (other.weight.bits, other.input.bits, other.softmax.bits) == (4, (4, 8), 8)
    assert first_match(Policy().rules(Widths(4, (4, 8))), "conv_in").spec.input.bits == 16


# Whole networks.


def test_ranges_list_the_candidates(unet, example, batch):
    quantize_(unet, Policy().rules(Widths(8, (4, 8))), example)
    calibrate_(unet, "minmax", [batch])
    stored = json.loads(json.dumps(range_table(unet), allow_nan=False))
    found = stored["mid_block.resnets.0.conv1.input_quantizer"]
    assert found["bits"] == [4, 8] and found["qmax"] == [[15.0], [255.0]] and len(found["scale"]) == 2
    assert stored["mid_block.resnets.0.conv1.weight_quantizer"]["bits"] == 8
    assert stored["conv_in.input_quantizer"]["bits"] == 16


def test_the_softmax_map_can_have_candidates(unet, example, batch):
    softmax = TensorSpec((4, 8), symmetric=True)
    quantize_(unet, [Rule("*attentions.0", QuantSpec(softmax=softmax))], example)
    calibrate_activations_(unet, "minmax", [batch])
    quantizer = unet.mid_block.attentions[0].softmax_quantizer
    assert quantizer.qmax.tolist() == [[15], [255]] and quantizer.zero_point.tolist() == [[0], [0]]
    outputs = []
    for row in (0, 1):
        select_row(unet, row)
        with torch.no_grad():
            outputs.append(unet(*batch).sample)
    assert not torch.equal(*outputs)


def test_digits_at_each_row_is_the_network_of_that_width(monkeypatch):
    use_few_candidate_ranges(monkeypatch)
    model = digits_model()
    x = torch.randn(4, *model.sample_shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([900.0, 600.0, 300.0, 10.0])

    def calibrated(activation_bits):
        network = model.copy_denoiser()
        quantize_(network, Policy().rules(Widths(8, activation_bits)), model.example_inputs())
        calibrate_weights_(network, "minmax")
        calibrate_activations_(network, "mse", [(x, t)])
        return network

    mixed = calibrated((4, 8))
    with torch.no_grad():
        expected = [calibrated(bits)(x, t) for bits in (4, 8)]
        for row in (1, 0, 1):
            select_row(mixed, row)
            assert torch.equal(mixed(x, t), expected[row])
    assert not torch.equal(*expected)


# The account.


def two_layers():
    """4 * 3 MACs at W8, activations 4 or 8; 3 * 2 MACs at W8A8."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    rules = [
        Rule("0", QuantSpec(TensorSpec(8), TensorSpec((4, 8)))), Rule("1", QuantSpec(TensorSpec(8), TensorSpec(8))),
    ]
    return model, quantize_(model, rules, (torch.zeros(1, 4),))


def test_a_mixture_by_hand():
    _, report = two_layers()
    assert report.candidates == 2 and report.rows[0].activation_bits == (4, 8) and report.rows[0].covered
    assert [report.at(row).totals["bops"]["conv_linear"] for row in (0, 1)] == [12 * 32 + 6 * 64, 18 * 64]
    assert [report.at(row).rows[0].activation_bits for row in (0, 1)] == [4, 8]
    mixed = report.mixed((Fraction(1, 4), Fraction(3, 4)))
    bops = 0.25 * 768 + 0.75 * 1152
    assert mixed.totals["bops"] == {"conv_linear": bops, "everything": bops}
    assert mixed.totals["bops_reduction"]["everything"] == pytest.approx(18 * 1024 / bops)
    same = ("macs", "coverage", "weight_bytes", "params", "bops_fp32")
    assert all(mixed.totals[key] == report.at(1).totals[key] for key in same)
    assert mixed.table()["bops"].tolist() == [0.25 * 384 + 0.75 * 768, 384]
    assert mixed.at(0) == report.at(0)


def test_a_mixture_is_written_and_shown():
    mixed = two_layers()[1].mixed((0.25, 0.75))
    stored = json.loads(json.dumps(mixed.to_dict(), allow_nan=False))
    assert stored == mixed.to_dict()
    assert stored["shares"] == [0.25, 0.75] and stored["layers"][0]["activation_bits"] == [4, 8]
    assert "shares" not in mixed.at(0).to_dict()
    lines = mixed.summary().splitlines()
    assert [line.split()[-2:] for line in lines if line.startswith("Linear")] == [["8", "4/8"], ["8", "8"]]
    assert "activation bits by share of evaluations: 4 in 25.00%, 8 in 75.00%" in lines


@pytest.mark.parametrize("ask", [
    lambda report: report.totals, lambda report: report.summary(), lambda report: report.to_dict(),
    lambda report: report.table(), lambda report: report.rows[0].bops,
])
def test_without_shares_there_are_no_totals(ask):
    with pytest.raises(QuantizationError, match=r"report\.mixed\(shares\) or report\.at\(row\)"):
        ask(two_layers()[1])


@pytest.mark.parametrize("shares", [(1.0,), (0.5, 0.6), (1.5, -0.5), (0.2, 0.3, 0.5), (float("nan"), 1.0), ()])
def test_impossible_shares_are_refused(shares):
    with pytest.raises(QuantizationError, match="Report.mixed"):
        two_layers()[1].mixed(shares)


@pytest.mark.parametrize("row", [-1, 2])
def test_a_report_has_no_other_rows(row):
    with pytest.raises(QuantizationError, match=r"choose 0\.\.1"):
        two_layers()[1].at(row)


def test_both_operands_of_an_attention_product_switch_together(unet, example):
    report = quantize_(unet, Policy().rules(Widths(8, (4, 8), softmax=6)), example)
    for row, bits in enumerate((4, 8)):
        products = {r.name: r for r in report.at(row).rows if r.scope == "attention"}
        qk, av = products["mid_block.attentions.0.qk"], products["mid_block.attentions.0.av"]
        assert (qk.weight_bits, qk.activation_bits, av.weight_bits, av.activation_bits) == (bits, bits, bits, 6)
    plain = describe(unet, example)
    assert plain == report


def test_a_report_of_one_width_has_one_row():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    report = quantize_(model, [Rule("0", QuantSpec(TensorSpec(8), TensorSpec(8)))], (torch.zeros(1, 4),))
    assert report.candidates == 1 and report.at(0) == report
    assert report.mixed((1.0,)).totals == report.totals
