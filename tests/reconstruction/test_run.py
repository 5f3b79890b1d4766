"""Block after block: errors are those of held-out samples, and a block that became worse is as it was before."""

import copy

import numpy as np
import pytest
import torch
from all_blocks import run

from ptq_exp.errors import DataError
from ptq_exp.quantization import fake_quantize, quantizers
from ptq_exp.reconstruction import Annealing, BlockReport, Reconstruction, Settings, find_blocks, split, summary, table

EXAMPLE = (torch.zeros(1, 1, 6, 6), torch.zeros(1))
BLOCKS = ("*resnets.*",)


def reconstruction(network, toy, calibration_set, folder, iterations=25, patterns=BLOCKS, **settings):
    settings = Settings(Annealing(iterations), **{"lr": 0.05, "batch_size": 16} | settings)
    return Reconstruction(
        network, toy, find_blocks(network, patterns, EXAMPLE), calibration_set, settings, seed=0, batch_size=16,
        cache_bytes=1e9, folder=folder,
    )


def output_error(network, toy, calibration_set):
    x, t, _ = next(iter(split(calibration_set)[1].batches(64)))
    with torch.no_grad():
        return float((network(x, t) - toy(x, t)).square().mean())


@pytest.mark.parametrize("settings", [
    {}, {"patterns": ()}, {"input_prob": 0.5}, {"inner_weight": 0.5},
    {"step_lr": 1e-3, "drop_prob": 0.5, "input_prob": 0.5}, {"power": 2.4, "input_prob": 0.0},
])
def test_the_network_comes_closer_to_full_precision_on_held_out_samples(
    settings, toy, quantized, calibration_set, tmp_path
):
    network = quantized(3)
    before = output_error(network, toy, calibration_set)
    reports = run(reconstruction(network, toy, calibration_set, tmp_path, **settings))
    after = output_error(network, toy, calibration_set)
    assert after < before
    assert [r.index for r in reports] == list(range(len(reports))) and sum(r.layers for r in reports) == 9
    # the last block is the network's output: its error is the network's
    last = reports[-1].after_quantized if reports[-1].kept else reports[-1].before_quantized
    assert last.mse == pytest.approx(after, rel=1e-4)
    for report in reports:
        assert report.kept == (report.after_quantized.mse <= report.before_quantized.mse)
    for layer in network.modules():
        if hasattr(layer, "weight_quantizer"):
            grid = layer.weight_quantizer.cells(layer.weight)
            assert torch.equal(layer.weight, fake_quantize(layer.weight, *grid))


def test_the_first_block_sees_equal_inputs_and_its_error_is_that_of_a_direct_forward(
    toy, quantized, calibration_set, tmp_path
):
    network = quantized(3, None)
    made = reconstruction(network, toy, calibration_set, tmp_path, patterns=("conv_in",))
    made.blocks = [block for block in made.blocks if block.name == "conv_in"]
    x = split(calibration_set)[1].x
    expected = float((network.conv_in(torch.from_numpy(x)) - toy.conv_in(torch.from_numpy(x))).square().mean())
    (report,) = run(made)
    assert report.before_fp == report.before_quantized
    assert report.before_fp.mse == pytest.approx(expected, rel=1e-5)
    assert report.kept


def test_a_block_made_worse_keeps_its_weights_and_step_sizes(toy, quantized, calibration_set, tmp_path):
    network = quantized(4)
    before = copy.deepcopy(network.state_dict())
    # nothing but noise: huge steps of the step sizes
    made = reconstruction(network, toy, calibration_set, tmp_path, iterations=3, lr=0.0, step_lr=3.0)
    reports = run(made)
    assert not all(report.kept for report in reports)
    for report in reports:
        assert report.kept or report.after_quantized.mse > report.before_quantized.mse
        same = all(
            torch.equal(value, before[key])
            for key, value in network.state_dict().items()
            if key.startswith(f"{report.name}.")
        )
        assert same or report.kept
        assert report.kept or report.changed == 0


def test_two_runs_are_bitwise_the_same_wherever_rows_lie_and_another_seed_is_not(
    toy, quantized, calibration_set, tmp_path
):
    states = []
    for seed, cache_bytes in ((0, 1e9), (0, 0), (1, 1e9)):
        network = quantized(3)
        made = reconstruction(
            network, toy, calibration_set, tmp_path, step_lr=1e-3, drop_prob=0.5, input_prob=0.5, iterations=5
        )
        made.seed, made.arena.limit = seed, cache_bytes
        run(made)
        states.append(network.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert not all(torch.equal(value, states[2][key]) for key, value in states[0].items())


def test_only_weights_and_step_sizes_change(toy, quantized, calibration_set, tmp_path):
    network = quantized(3)
    before = copy.deepcopy(network.state_dict())
    run(reconstruction(network, toy, calibration_set, tmp_path, step_lr=1e-2, iterations=5))
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(key.endswith(("weight", "input_quantizer.scale")) for key in changed)
    assert not any(q._forward_hooks or q.scale.requires_grad for _, q in quantizers(network))
    assert not any(p.grad is not None for p in [*network.parameters(), *toy.parameters()])


def test_every_eighth_sample_is_held_out(calibration_set):
    optimised_on, held_out = split(calibration_set)
    assert (len(optimised_on), len(held_out)) == (35, 5)
    assert np.array_equal(held_out.x, calibration_set.x[7::8])
    few, one = split(split(calibration_set)[1])
    assert (len(few), len(one)) == (4, 1)
    with pytest.raises(DataError, match="calibration.n_samples"):
        split(one)


def test_reports_survive_json_and_are_summed_up(toy, quantized, calibration_set, tmp_path):
    reports = run(reconstruction(quantized(3), toy, calibration_set, tmp_path, iterations=3))
    assert [BlockReport.from_dict(report.to_dict()) for report in reports] == reports
    rows = table(reports)
    assert len(rows) == len(reports) and "before_quantized.relative" in rows
    said = summary(reports)
    assert said["blocks"] == len(reports) and said["error"] <= said["error_before"]
    assert summary([]) == {"blocks": 0}
