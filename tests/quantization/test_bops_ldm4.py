"""Bit operations of LDM-4 on ImageNet (`cin256-v2`) under PTQD's policy (He et al. 2023), without any weights.

Widths are those of PTQD: first and last layers (time embedding, input and output convolution) 8 bits for weights and
inputs. Two accounts: every convolution and linear layer quantized, which is what the paper's 19.9x takes, and with
the layers in full precision that its code leaves there.
"""

import functools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from ptq_exp.diffusion.denoisers import ClassConditionalUNet
from ptq_exp.diffusion.zoo.latent import conditional_unet
from ptq_exp.embedded import digits_ldm_model, digits_model
from ptq_exp.quantization import Policy, Report, Rule, Widths, quantize_

# [name in latent-diffusion, type, MACs, weights] of every convolution and linear layer, latents of 64x64.
GOLDEN = Path(__file__).parents[1] / "golden" / "ldm4_macs.json"
PTQD = yaml.safe_load((Path(__file__).parents[2] / "conf" / "quantization" / "ptqd.yaml").read_text())
T = 1e12


def policy(weight: int, activation: int | tuple[int, ...], kept: bool, attention: bool) -> list[Rule]:
    """The shipped policy, with or without the layers that it keeps in full precision."""
    keep = [Rule(pattern, None, "kept") for pattern in PTQD["keep_fp"] if kept]
    shipped = {key: PTQD[key] for key in ("first", "last", "weight_granularity")}
    return keep + Policy(attention=attention, **shipped).rules(Widths(weight, activation, boundary=8))


@functools.cache
def ldm4(weight: int, activation: int | tuple[int, ...], kept: bool = False, attention: bool = False) -> Report:
    with torch.device("meta"):
        denoiser = ClassConditionalUNet(conditional_unet(), nn.Embedding(1001, 512))
        example = torch.empty(1, 3, 64, 64), torch.empty(1), torch.empty(1, dtype=torch.long)
    return quantize_(denoiser, policy(weight, activation, kept, attention), example)


def layers(report: Report) -> list:
    return [row for row in report.rows if row.scope == "conv_linear"]


def test_macs_of_every_layer_are_those_of_the_original():
    golden = json.loads(GOLDEN.read_text())
    found = Counter((row.type, row.macs) for row in layers(ldm4(8, 8)))
    assert len(golden) == found.total() == 283
    assert found == Counter((kind, int(macs)) for _, kind, macs, _ in golden)
    assert ldm4(8, 8).totals["macs"] == {"conv_linear": 99_769_810_944, "everything": 104_227_160_064}


def test_the_kept_layers_are_those_whose_name_has_skip_or_op_in_the_original():
    golden = json.loads(GOLDEN.read_text())
    theirs = [int(macs) for name, _, macs, _ in golden if {"skip_connection", "op"} & set(name.split("."))]
    ours = [row for row in layers(ldm4(8, 8, kept=True)) if not row.covered]
    assert sorted(row.macs for row in ours) == sorted(theirs) and len(theirs) == 18
    assert 1 - ldm4(8, 8, kept=True).totals["coverage"]["conv_linear"] == pytest.approx(0.039, abs=5e-4)


def test_the_first_and_last_layers_have_8_bits():
    eight = [row.name for row in layers(ldm4(4, 4)) if (row.weight_bits, row.activation_bits) == (8, 8)]
    assert sorted(eight) == ["unet.conv_in", "unet.conv_out", "unet.time_embedding.linear_1"]


def test_full_precision():
    bops = ldm4(8, 8).totals["bops_fp32"]
    assert bops["conv_linear"] == pytest.approx(102.16 * T, abs=0.005 * T)
    assert bops["everything"] == pytest.approx(106.73 * T, abs=0.005 * T)


@pytest.mark.parametrize(
    ("weight", "activation", "bops", "reduction"),
    [(8, 8, 6.385, 16.0), (4, 8, 3.194, 32.0), (8, 4, 3.194, 32.0), (4, 4, 1.598, 63.9)],
)
def test_every_layer_quantized(weight, activation, bops, reduction):
    totals = ldm4(weight, activation).totals
    assert totals["coverage"]["conv_linear"] == 1
    assert totals["bops"]["conv_linear"] == pytest.approx(bops * T, abs=0.0005 * T)
    assert totals["bops_reduction"]["conv_linear"] == pytest.approx(reduction, abs=0.05)
    # attention products in full precision: 4.457 G MACs
    assert totals["bops"]["everything"] - totals["bops"]["conv_linear"] == 4_457_349_120 * 1024


def test_step_aware_mixed_precision():
    """8-bit weights, activations of 8 bits in 152 of 250 steps and of 4 in the others: the published 19.9x."""
    totals = ldm4(8, (4, 8)).mixed((98 / 250, 152 / 250)).totals
    assert totals["bops"]["conv_linear"] == pytest.approx(5.134 * T, abs=0.0005 * T)
    assert totals["bops_reduction"]["conv_linear"] == pytest.approx(19.9, abs=0.05)
    assert totals["bops_reduction"]["everything"] == pytest.approx(11.0, abs=0.05)
    assert totals["weight_bytes"] == ldm4(8, 8).totals["weight_bytes"]


def test_at_each_step_a_mixture_is_one_of_the_uniform_networks():
    mixed = ldm4(8, (4, 8))
    assert mixed.at(0).totals == ldm4(8, 4).totals and mixed.at(1).totals == ldm4(8, 8).totals


@pytest.mark.parametrize(
    ("weight", "activation", "conv_linear", "everything"),
    [(8, 8, 10.1, 7.3), (4, 8, 14.5, 9.2), (4, 4, 18.6, 10.6)],
)
def test_with_the_layers_kept_that_the_code_keeps(weight, activation, conv_linear, everything):
    reduction = ldm4(weight, activation, kept=True).totals["bops_reduction"]
    assert reduction["conv_linear"] == pytest.approx(conv_linear, abs=0.05)
    assert reduction["everything"] == pytest.approx(everything, abs=0.05)


def test_the_published_saving_is_out_of_reach_with_the_layers_kept():
    lowest = ldm4(4, (4, 8), kept=True)
    assert lowest.at(0).totals["bops_reduction"]["conv_linear"] < 19.9


def test_step_aware_mixed_precision_with_the_layers_kept():
    reduction = ldm4(8, (4, 8), kept=True).mixed((98 / 250, 152 / 250)).totals["bops_reduction"]
    assert reduction["conv_linear"] == pytest.approx(11.5, abs=0.05)
    assert reduction["everything"] == pytest.approx(7.9, abs=0.05)


def test_attention_products_can_be_mixed_too():
    totals = ldm4(8, (4, 8), attention=True).mixed((98 / 250, 152 / 250)).totals
    assert totals["coverage"]["everything"] == 1
    assert totals["bops_reduction"]["everything"] == pytest.approx(20.0, abs=0.05)


@pytest.mark.parametrize("make", [digits_model, digits_ldm_model])
def test_the_policy_fits_the_embedded_models(make):
    model = make()
    rules = policy(4, 8, kept=True, attention=PTQD["attention"])
    report = quantize_(model.copy_denoiser(), rules, model.example_inputs())
    eight = [row.name for row in layers(report) if row.weight_bits == 8]
    assert sorted(eight) == ["unet.conv_in", "unet.conv_out", "unet.time_embedding.linear_1"]
    assert {row.reason for row in layers(report)} == {"", "kept"}
