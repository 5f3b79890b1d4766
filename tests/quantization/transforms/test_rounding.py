"""How transforms round what a layer multiplies: as the quantizers of the network will, in any format."""

import pytest
import torch
from torch import nn

from ptq_exp.quantization import QuantSpec, TensorSpec
from ptq_exp.quantization.affine import fake_quantize
from ptq_exp.quantization.formats import FORMATS
from ptq_exp.quantization.quantizer.dynamic import extremes, range_of
from ptq_exp.quantization.transforms.low_rank import LowRankBranch
from ptq_exp.quantization.transforms.rounding import input_rounding, weight_rounding

ROWS = torch.randn(24, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.logspace(-1, 1, 64)


def linear(out=48):
    torch.manual_seed(0)
    return nn.Linear(64, out)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8_e4m3", "int4_g32", "nvfp4_one_level"])
def test_inputs_in_blocks_are_those_of_the_format(name):
    found = input_rounding(linear(), QuantSpec(None, TensorSpec(name)), ROWS)(ROWS)
    assert torch.equal(found, FORMATS[name].fake_quantize(ROWS.float()).double())


def test_the_scale_of_a_tensor_is_that_of_all_rows():
    rounded = input_rounding(linear(), QuantSpec(None, TensorSpec("nvfp4")), ROWS)
    scale = FORMATS["nvfp4"].scale_of(ROWS.abs().amax())
    assert torch.equal(rounded(ROWS[:2]), FORMATS["nvfp4"].fake_quantize(ROWS[:2].float(), scale).double())


@pytest.mark.parametrize(("name", "most"), [("fp8_e4m3fn", 0.03), ("fp4_e2m1", 0.3)])
def test_floats_have_a_scale_that_fits_the_rows(name, most):
    found = input_rounding(linear(), QuantSpec(None, TensorSpec(name)), ROWS)(ROWS)
    assert float((found - ROWS).norm() / ROWS.norm()) < most


def test_a_range_that_follows_the_data_is_that_of_each_row():
    spec = QuantSpec(None, TensorSpec(4, symmetric=True, dynamic="token"))
    found = input_rounding(linear(), spec, ROWS)(ROWS)
    cells = range_of(*extremes(ROWS.float(), "token"), 4, symmetric=True)
    assert torch.equal(found, fake_quantize(ROWS.float(), *cells).double())


@pytest.mark.parametrize("bits", [4, "nvfp4", "mxfp4", "fp4_e2m1", "nf4"])
def test_a_branch_brings_outputs_nearer_in_any_format(bits):
    layer, spec = linear(), QuantSpec(TensorSpec(bits), None if bits == "nf4" else TensorSpec(bits))
    with torch.no_grad():
        layer.weight[:, :4] *= 20
    weight = layer.weight.detach().double()
    found = LowRankBranch(rank=4).split([layer], [spec], ROWS)
    read, rounded = input_rounding(layer, spec, ROWS)(ROWS), weight_rounding(layer, spec)
    plain = ROWS @ weight.T - read @ rounded(weight).T
    branched = ROWS @ weight.T - (ROWS @ (found.up @ found.down).T + read @ found.residual.T)
    assert branched.norm() < 0.9 * plain.norm()
