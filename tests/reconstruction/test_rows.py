"""Reconstruction where the activation ranges differ between sampling steps: each sample uses those of its step."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from all_blocks import run

from ptq_exp.calibration import CalibrationSet
from ptq_exp.quantization import (
    Policy,
    Widths,
    calibrate_activations_,
    calibrate_weights_,
    load_quantized_,
    quantize_,
    quantizers,
    save_quantized,
    select_row,
    step_of,
)
from ptq_exp.reconstruction import Annealing, Reconstruction, Settings, find_blocks

EXAMPLE = (torch.zeros(1, 1, 6, 6), torch.zeros(1))
STEPS, BINS = 6, 3
ROW_OF_STEP = torch.arange(STEPS) // 2
SCALES = np.geomspace(1, 0.1, STEPS)


@pytest.fixture(scope="module")
def samples() -> CalibrationSet:
    """48 states of six steps whose sizes differ by ten times; the last step comes up once, and is held out."""
    rng = np.random.default_rng(0)
    step = rng.permutation(np.arange(48) % (STEPS - 1))
    step[-1] = STEPS - 1
    x = rng.standard_normal((48, 1, 6, 6)) * SCALES[step].reshape(-1, 1, 1, 1)
    return CalibrationSet(x.astype(np.float32), step, (1000 - 150 * step).astype(np.float32), np.zeros(48, int))


def rules(bins, bits=4):
    return Policy(first=(), last=(), attention=False).rules(Widths(3, bits), bins=bins)


def quantized(toy, samples, row_of_step, bits=4):
    """Calibrated with a row for each bin of `row_of_step`; activations of `bits`."""
    network, bins = copy.deepcopy(toy), int(row_of_step.max()) + 1
    quantize_(network, rules(bins, bits), EXAMPLE)
    calibrate_weights_(network, "minmax")
    for row in range(bins):
        if bins > 1:
            select_row(network, row)
        chosen = (row_of_step[torch.from_numpy(samples.step)] == row).nonzero().flatten().numpy()
        calibrate_activations_(network, "minmax", [(x, t) for x, t, _ in samples.take(chosen).batches(16)])
    return network


def reconstruction(network, toy, samples, folder, row_of_step=ROW_OF_STEP, iterations=30, **settings):
    settings = Settings(Annealing(iterations), **{"lr": 0.05, "batch_size": 16, "step_lr": 5e-3} | settings)
    return Reconstruction(
        network, toy, find_blocks(network, ("*resnets.*",), EXAMPLE), samples, settings, seed=0, batch_size=10,
        cache_bytes=1e9, folder=folder, row_of_step=row_of_step,
    )


@torch.no_grad()
def error_alone(network, toy, samples, row_of_step, block=None):
    """Squared error of the output, or of the module `block` on full-precision inputs, sample by sample at its row."""
    read = {}
    squares = []
    for n in range(len(samples)):
        (x, t, _), = samples.take(np.array([n])).batches(1)
        if int(row_of_step.max()):
            select_row(network, int(row_of_step[samples.step[n]]))
        if block is None:
            squares.append((network(x, t) - toy(x, t)).square().mean())
            continue
        handle = toy.get_submodule(block).register_forward_hook(lambda _, args, y: read.update(x=args, y=y))
        toy(x, t)
        handle.remove()
        squares.append((network.get_submodule(block)(*read["x"]) - read["y"]).square().mean())
    return float(torch.stack(squares).mean())


def test_errors_are_those_of_each_held_out_sample_alone_at_its_row(toy, samples, tmp_path):
    network = quantized(toy, samples, ROW_OF_STEP)
    made = reconstruction(network, toy, samples, tmp_path)
    expected = error_alone(network, toy, made.held_out, ROW_OF_STEP, "conv_in")
    assert made.block.name != "conv_in"
    while made.block.name != "conv_in":
        made.blocks.pop(0)
    made.begin()
    assert made._before[0].mse == pytest.approx(expected, rel=1e-5)
    wrong = error_alone(network, toy, made.held_out, (ROW_OF_STEP + 1) % BINS, "conv_in")
    assert abs(wrong - expected) > 0.1 * expected


def test_inputs_of_a_block_are_those_of_each_sample_alone_at_its_row(toy, samples, tmp_path):
    network = quantized(toy, samples, ROW_OF_STEP)
    made = reconstruction(network, toy, samples, tmp_path)
    while made.block.name != "conv_out":
        made.blocks.pop(0)
    made.begin()
    calls = made.current.data.quantized
    assert torch.equal(calls.step_rows, ROW_OF_STEP[torch.from_numpy(made.optimised_on.step)])
    read = []
    network.conv_out.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    for n in (0, 11, 40):
        (x, t, _), = made.optimised_on.take(np.array([n])).batches(1)
        select_row(network, int(calls.step_rows[n]))
        network(x, t)
        # rounding amplifies the last digit of a convolution: a few elements may fall to the next level
        assert float((read[-1] - calls.tensors[0][n]).abs().median()) < 1e-6


def test_both_halves_of_guidance_use_the_row_of_their_sample(samples):
    guided = replace(samples, conditions={"y": np.arange(48)}, unconditional={"y": np.array(99)})
    steps = guided.batch_steps(10)
    times = torch.cat([t for _, t, _ in guided.batches(10)])
    assert len(steps) == 96 and torch.equal(1000 - 150 * steps.float(), times)
    assert torch.equal(samples.batch_steps(10), torch.from_numpy(samples.step))


@pytest.mark.parametrize(("bits", "settings"), [
    (4, {}), (8, {"step_lr": 0.0}), (4, {"drop_prob": 0.5, "input_prob": 0.5}),
])
def test_the_error_falls_on_held_out_samples_at_their_own_rows(bits, settings, toy, samples, tmp_path):
    network = quantized(toy, samples, ROW_OF_STEP, bits)
    made = reconstruction(network, toy, samples, tmp_path, **settings)
    before = error_alone(network, toy, made.held_out, ROW_OF_STEP)
    reports = run(made)
    after = error_alone(network, toy, made.held_out, ROW_OF_STEP)
    assert after < before and sum(r.kept for r in reports) > len(reports) / 2
    # the last block is the network's output: its error is the network's
    last = reports[-1].after_quantized if reports[-1].kept else reports[-1].before_quantized
    assert last.mse == pytest.approx(after, rel=2e-2)


def test_step_factors_of_a_batch_get_gradients_in_its_rows_alone(toy, samples, tmp_path):
    network = quantized(toy, samples, ROW_OF_STEP)
    made = reconstruction(network, toy, samples, tmp_path)
    made.begin()
    found = made.current
    found.data.full.step_rows = torch.full((len(made.optimised_on),), 1)
    found.step()
    for quantizer, grad in zip(
        found.quantizers.values(), found.steps.factors.grad.split([q.scale.numel() for q in found.quantizers.values()]),
        strict=True,
    ):
        grad = grad.view(quantizer.scale.shape)
        assert float(grad[1].abs().min()) > 0 and not grad[[0, 2]].any()


def test_a_row_that_no_sample_uses_keeps_its_step_sizes(toy, samples, tmp_path):
    per_step = torch.arange(STEPS)
    network = quantized(toy, samples, per_step)
    before = {name: q.scale.clone() for name, q in quantizers(network) if q.scale.shape[0] == STEPS and "in" in name}
    made = reconstruction(network, toy, samples, tmp_path, row_of_step=per_step)
    assert made.held_out.step.tolist().count(STEPS - 1) == 1 and STEPS - 1 not in made.optimised_on.step
    reports = run(made)
    changed = 0
    for name, scale in before.items():
        now = network.get_submodule(name).scale
        assert torch.equal(now[-1], scale[-1])
        changed += int((now[:-1] != scale[:-1]).sum())
    assert changed > 0 and any(report.kept for report in reports)
    assert len(step_of(network).row) == 1


def test_one_bin_is_reconstructed_bit_for_bit_as_without_rows(toy, samples, tmp_path):
    static = torch.zeros(STEPS, dtype=torch.long)
    states = []
    for row_of_step in (None, static):
        network = quantized(toy, samples, static)
        run(reconstruction(network, toy, samples, tmp_path, row_of_step=row_of_step, iterations=4))
        states.append(network.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_rows_that_differ_only_in_number_give_what_one_row_gives(toy, samples, tmp_path):
    """Three equal rows, weights alone learned: the same roundings as with one row."""
    static = torch.zeros(STEPS, dtype=torch.long)
    one, many = quantized(toy, samples, static), quantized(toy, samples, ROW_OF_STEP)
    for (_, source), (_, target) in zip(quantizers(one), quantizers(many), strict=True):
        for field in ("scale", "zero_point", "qmin", "qmax"):
            getattr(target, field).copy_(getattr(source, field).expand(getattr(target, field).shape))
    for network, row_of_step in ((one, static), (many, ROW_OF_STEP)):
        run(reconstruction(network, toy, samples, tmp_path, row_of_step=row_of_step, step_lr=0.0, iterations=10))
    weights = dict(many.named_parameters())
    assert all(torch.equal(weight, weights[name]) for name, weight in one.named_parameters())


def test_the_saved_network_is_the_reconstructed_one_bit_for_bit(toy, samples, tmp_path):
    network = quantized(toy, samples, ROW_OF_STEP)
    report = quantize_(copy.deepcopy(toy), rules(BINS), EXAMPLE)
    run(reconstruction(network, toy, samples, tmp_path / "rows", iterations=5))
    save_quantized(tmp_path, network, rules(BINS), report, {})
    fresh = copy.deepcopy(toy)
    load_quantized_(fresh, tmp_path, EXAMPLE)
    x, t, _ = next(iter(samples.batches(8)))
    outputs = []
    for row in range(BINS):
        for model in (network, fresh):
            select_row(model, row)
        outputs.append(network(x, t))
        assert torch.equal(fresh(x, t), outputs[-1])
    assert not torch.equal(outputs[0], outputs[1])
