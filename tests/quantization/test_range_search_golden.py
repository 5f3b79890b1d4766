"""Range search against the public implementations and an exhaustive scan, on the golden tensors."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from ptq_exp.quantization.affine import QRange, choose_qparams, fake_quantize
from ptq_exp.quantization.ranges.range_search import search_range

GOLDEN = Path(__file__).parents[1] / "golden"


@cache
def golden() -> tuple[dict, list[dict]]:
    """Input tensors, and the deployable asymmetric reference results on them (zero point inside the grid)."""
    inputs, table = np.load(GOLDEN / "search_inputs.npz"), np.load(GOLDEN / "search_references.npz")
    rows = [dict(zip(table.files, values, strict=True)) for values in zip(*table.values(), strict=True)]
    deployable = [r for r in rows if r["zero_point_min"] >= 0 and r["zero_point_max"] <= 2.0 ** r["bits"] - 1]
    return {name: torch.from_numpy(inputs[name]) for name in inputs.files}, deployable


ACTIVATIONS = ["gauss", "skew", "silu", "heavy", "pos", "neg", "softmax", "bimodal", "offset"]
CASES = [(f"act_{name}", "pt") for name in ACTIVATIONS]
CASES += [(f"w_{name}", granularity) for name in ("conv", "linear", "conv1d", "edge") for granularity in ("pt", "ch")]


def mean_error(x: torch.Tensor, found: QRange, p: float = 2.4) -> float:
    return float((x.double() - fake_quantize(x, *found).double()).abs().pow(p).mean())


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize(("name", "granularity"), CASES)
def test_asymmetric_search_is_no_worse_than_the_best_deployable_reference(name, granularity, bits):
    inputs, references = golden()
    ours = search_range(inputs[name], bits, symmetric=False, channel_axis={"pt": None, "ch": 0}[granularity])
    achieved = mean_error(inputs[name], ours)
    key = (name, granularity, bits)
    best = min((r["l24"] for r in references if (r["tensor"], r["granularity"], r["bits"]) == key), default=None)
    assert (best is None) == (name == "w_edge" and granularity == "pt")  # no reference has that case
    assert best is None or achieved <= best * 1.001


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize(("name", "granularity"), CASES)
def test_symmetric_search_is_no_worse_than_a_scan_of_1000_scales(name, granularity, bits):
    x = golden()[0][name]
    ours = search_range(x, bits, symmetric=True, channel_axis={"pt": None, "ch": 0}[granularity])
    rows = x.reshape(1, -1) if granularity == "pt" else x.flatten(1)
    plain = choose_qparams(rows.amin(1, keepdim=True), rows.amax(1, keepdim=True), bits, symmetric=True)
    low, high = plain.qmin / plain.qmax.clamp(min=1), plain.qmax
    assert ((plain.qmax - plain.qmin) == 2**bits - 1).all() and (low <= 0).all() and (high >= 0).all()
    least = torch.full_like(plain.scale, torch.inf)
    for fraction in torch.arange(1, 1001).div(1000).split(50):
        scale = plain.scale[..., None] * fraction
        level = (rows[:, :, None] / scale).round().clamp(plain.qmin[..., None], plain.qmax[..., None])
        error = (rows[:, :, None] - level * scale).abs().pow(2.4).mean(1)
        least = torch.minimum(least, error.amin(1, keepdim=True))
    assert torch.equal(ours.zero_point, torch.zeros_like(ours.zero_point))
    assert mean_error(x, ours) <= float(least.double().mean()) * 1.001
