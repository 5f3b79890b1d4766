"""GPTQ on number formats: the levels that it may choose are those of the format, and it chooses better ones."""

import copy

import pytest
import torch
from all_blocks import run

from ptq_exp.errors import QuantizationError
from ptq_exp.quantization import Policy, Widths, calibrate_, quantize_
from ptq_exp.quantization.formats import FORMATS, BlockFormat, CodebookFormat
from ptq_exp.reconstruction import GPTQSettings, Reconstruction, find_blocks
from ptq_exp.reconstruction.gptq_grid import Elements

EXAMPLE = (torch.zeros(1, 1, 6, 6), torch.zeros(1))
BLOCKS = [
    name for name, made in FORMATS.items() if isinstance(made, BlockFormat) and not isinstance(made, CodebookFormat)
]


@pytest.mark.parametrize("name", BLOCKS)
def test_the_nearest_of_elements_and_units_is_the_cast(name):
    made = FORMATS[name]
    x = torch.randn(5, 150, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, 5)[:, None]
    x[2, :70] = 0
    scales = made.scales(x)
    grid = Elements(made.units(scales, tuple(x.shape)), made.elements)
    wanted = made.cast(x, scales).double()
    assert torch.allclose(grid.nearest(x.double()) * grid.scale, wanted, rtol=1e-6, atol=0)
    row = Elements(grid.scale[None], grid.values).row(3)
    assert torch.allclose(row.nearest(x[None, 3].double()) * row.scale, wanted[None, 3], rtol=1e-6, atol=0)


def test_a_codebook_is_refused():
    with pytest.raises(QuantizationError, match="codebook4: its elements differ from row to row"):
        _ = FORMATS["codebook4"].elements


@pytest.mark.parametrize("weight", ["mxfp4", "nvfp4", "nf4", "int4_g32", "int2_g32_signed", "fp8_e4m3fn", "mxint8"])
def test_outputs_come_nearer_and_weights_stay_in_the_format(weight, toy, calibration_set, tmp_path):
    network = copy.deepcopy(toy)
    quantize_(network, Policy(first=(), last=(), attention=False).rules(Widths(weight, "int4_g32")), EXAMPLE)
    calibrate_(network, "minmax", [(x, t) for x, t, _ in calibration_set.batches(16)])
    before = {name: layer.weight.clone() for name, layer in layers_of(network)}
    reports = run(Reconstruction(
        network, toy, find_blocks(network, ("*resnets.*",), EXAMPLE), calibration_set, GPTQSettings(), seed=0,
        batch_size=16, cache_bytes=1e9, folder=tmp_path,
    ))
    details = [detail for report in reports for detail in report.details if detail.after is not None]
    assert details and sum(d.after for d in details) < 0.97 * sum(d.before for d in details)
    changed = 0
    for name, layer in layers_of(network):
        quantizer = layer.weight_quantizer
        assert quantizer.off_grid(layer.weight) == 0
        restored = torch.nn.Parameter(torch.empty_like(layer.weight), requires_grad=False)
        quantizer.restore(restored, quantizer.integers(layer.weight))
        assert torch.equal(restored, layer.weight)
        changed += int((layer.weight != before[name]).sum())
    assert changed


def layers_of(network):
    return [(name, module) for name, module in network.named_modules() if hasattr(module, "weight_quantizer")]
