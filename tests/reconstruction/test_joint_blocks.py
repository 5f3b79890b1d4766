"""Reconstruction of transformers whose blocks return two streams, or whose modules quantize their own products."""

import copy

import numpy as np
import pytest
import torch
from all_blocks import run
from small_transformers import built, call_of

from ptq_exp.calibration import CalibrationSet
from ptq_exp.quantization import Policy, Widths, calibrate_, quantize_
from ptq_exp.reconstruction import Annealing, GPTQSettings, Reconstruction, Settings, find_blocks

N = 6


@pytest.mark.parametrize("settings", [GPTQSettings(), Settings(Annealing(2), batch_size=4)], ids=["gptq", "learned"])
@pytest.mark.parametrize("name", ["sd3", "flux", "sana"])
def test_blocks_of_joint_and_linear_attention(name, settings, tmp_path):
    original = built(name)
    network = copy.deepcopy(original)
    quantize_(network, Policy(first=(), last=()).rules(Widths(4, 8, boundary=8), 1), call_of(name))
    x, t, conditions = call_of(name, N)
    calibrate_(network, "minmax", [(x, t, conditions)])
    states = CalibrationSet(
        x.numpy(), np.zeros(N, np.int64), t.numpy(), np.ones(N, np.int64),
        {key: value.numpy() for key, value in conditions.items()},
    )
    blocks = find_blocks(network, ("*transformer_blocks.?",), call_of(name))
    assert any(len(block.layers) > 4 for block in blocks)
    made = Reconstruction(
        network, original, blocks, states, settings, seed=0, batch_size=4, cache_bytes=1e9, folder=tmp_path
    )
    reports = run(made)
    assert len(reports) == len(blocks) and any(report.kept and report.changed > 0 for report in reports)
    if isinstance(settings, GPTQSettings):
        details = [detail for report in reports for detail in report.details]
        assert len(details) == sum(len(block.layers) for block in blocks)
        assert sum(detail.after for detail in details) < 0.8 * sum(detail.before for detail in details)
    with torch.no_grad():
        assert bool(network(x, t, **conditions)[0].isfinite().all())
