"""GPTQ of a network: Hessians against outputs of the layers themselves, the order, the judge, what is left alone."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from all_blocks import run
from torch import nn

from ptq_exp.calibration import CalibrationSet
from ptq_exp.quantization import (
    Policy,
    Widths,
    calibrate_activations_,
    calibrate_weights_,
    of_samples,
    quantize_,
    quantizers,
    select_row,
)
from ptq_exp.reconstruction import (
    BlockReport,
    GPTQSettings,
    InputHessian,
    Reconstruction,
    find_blocks,
    find_time_blocks,
    split,
    summary,
    table,
)
from ptq_exp.reconstruction.gptq_rounding import objective
from ptq_exp.reconstruction.hessian import grouped

EXAMPLE = (torch.zeros(1, 1, 6, 6), torch.zeros(1))


def reconstruction(network, toy, calibration_set, folder, patterns=("*resnets.*",), cache_bytes=1e9, **settings):
    return Reconstruction(
        network, toy, find_blocks(network, patterns, EXAMPLE), calibration_set, GPTQSettings(**settings), seed=0,
        batch_size=16, cache_bytes=cache_bytes, folder=folder,
    )


@pytest.mark.parametrize("layer", [
    nn.Linear(5, 3), nn.Conv1d(4, 3, 3, stride=2, padding=1, dilation=2), nn.Conv2d(4, 3, (3, 2), stride=(2, 1)),
    nn.Conv2d(4, 6, 3, padding="same", groups=2), nn.Conv2d(4, 4, 3, padding=2, groups=4),
    nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 3, 3, padding=(2, 1), padding_mode="circular"),
    nn.Conv1d(4, 3, 3, padding="same", padding_mode="replicate"),
], ids=str)
@pytest.mark.parametrize("chunk", [1, 1 << 24])
def test_the_hessian_gives_the_squared_output_of_any_weight(layer, chunk, monkeypatch):
    monkeypatch.setattr("ptq_exp.reconstruction.hessian.CHUNK", chunk)
    draw = torch.Generator().manual_seed(0)
    shape = {nn.Linear: (7, 2, 5), nn.Conv1d: (7, 4, 9), nn.Conv2d: (7, 4, 9, 6)}[type(layer)]
    x = torch.randn(shape, generator=draw)
    error = torch.randn(layer.weight.shape, generator=draw)
    hessian = InputHessian(layer)
    hessian.add(x[:4])
    hessian.add(x[4:])
    with torch.no_grad():
        layer.weight.copy_(error)
        layer.bias.zero_()
        y = layer(x)
    assert objective(grouped(layer, error), hessian.total) == pytest.approx(float(y.double().square().sum()), rel=1e-5)
    assert hessian.rows == y[:, 0].numel() if type(layer) is not nn.Linear else 14
    if type(layer) is not nn.Linear:
        alone = InputHessian(layer)
        alone.add(x[0])  # without a batch
        assert torch.allclose(alone.total, _of(layer, x[:1]).total)


def _of(layer, x):
    made = InputHessian(layer)
    made.add(x)
    return made


def test_each_hessian_is_of_the_network_whose_predecessors_are_rounded(toy, quantized, calibration_set, tmp_path):
    """Of all rows that are not held out, behind the layer's own activation quantizer."""
    network = quantized(3)
    made = reconstruction(network, toy, calibration_set, tmp_path, patterns=())
    reports = run(made)
    full = dict(toy.named_modules())
    seen = {}
    handles = [
        module.input_quantizer.register_forward_hook(lambda _, __, y, name=name: seen.__setitem__(name, y))
        for name, module in network.named_modules() if hasattr(module, "weight_quantizer")
    ]
    x, t, _ = next(iter(split(calibration_set)[0].batches(64)))
    network(x, t)
    for handle in handles:
        handle.remove()
    assert len(x) == 35 and len(reports) == 9
    for report in reports:
        (detail,), layer = report.details, network.get_submodule(report.name)
        kind = type(full[report.name])
        # the network of now has later layers rounded, too, but none before this one has changed since
        error = copy.deepcopy(full[report.name])
        error.weight.copy_(full[report.name].weight - layer.weight)
        error.bias.zero_()
        wrong = kind.forward(error, seen[report.name]).double()
        expected = float(wrong.square().sum()) / detail.inputs
        if report.kept:
            assert detail.after == pytest.approx(expected, rel=1e-4)
        else:
            assert detail.before == pytest.approx(expected, rel=1e-4)
        assert detail.after <= detail.before
        assert layer.weight_quantizer.off_grid(layer.weight) == 0


@pytest.mark.parametrize("act_order", [False, True])
def test_the_network_comes_closer_and_its_ranges_stay(act_order, toy, quantized, calibration_set, tmp_path):
    network = quantized(2)
    ranges = {name: q.scale.clone() for name, q in quantizers(network)}
    x, t, _ = next(iter(split(calibration_set)[1].batches(64)))
    before = float((network(x, t) - toy(x, t)).square().mean())
    made = reconstruction(network, toy, calibration_set, tmp_path, act_order=act_order, damping=0.05)
    reports = run(made)
    assert float((network(x, t) - toy(x, t)).square().mean()) < 0.8 * before
    assert all(torch.equal(q.scale, ranges[name]) for name, q in quantizers(network))
    assert [len(report.details) for report in reports] == [report.layers for report in reports]
    assert all(detail.damping == 0.05 for report in reports for detail in report.details)
    again = [BlockReport.from_dict(report.to_dict()) for report in reports]
    assert again == reports and summary(reports)["objective"] < 0.8 and len(table(reports)) == len(reports)


def test_blocks_or_layers_in_memory_or_in_files_give_the_same_weights(toy, quantized, calibration_set, tmp_path):
    """Only where every block is kept: the judge looks at blocks, or at layers."""
    states = []
    for patterns, cache_bytes in ((("*resnets.*",), 1e9), (("*resnets.*",), 0), ((), 1e9)):
        network = quantized(4)
        made = reconstruction(network, toy, calibration_set, tmp_path, patterns, cache_bytes)
        made._errors = lambda made=made, judge=made._errors: judge() if made.current is None else made._before
        run(made)
        states.append(network.state_dict())
    for other in states[1:]:
        for key, value in states[0].items():
            assert torch.allclose(value, other[key], atol=1e-6), key


def test_both_halves_of_guidance_count(toy, quantized, calibration_set, tmp_path):
    labels = np.arange(40)
    guided = replace(calibration_set, conditions={"y": labels}, unconditional={"y": np.array(0)})
    inputs = []
    for states in (calibration_set, guided):
        reports = run(reconstruction(quantized(4), toy, states, tmp_path))
        inputs.append([detail.inputs for report in reports for detail in report.details])
    assert inputs[1] == [2 * count for count in inputs[0]]


def test_a_block_made_worse_is_as_before(toy, quantized, calibration_set, tmp_path):
    network = quantized(4)
    before = copy.deepcopy(network.state_dict())
    made = reconstruction(network, toy, calibration_set, tmp_path)
    judge = made._errors
    worse = {"resnets.0"}

    def errors():
        found = judge()
        if made.current is None or made.block.name not in worse:
            return found
        return tuple(type(error)(2 * before.mse + 1, error.relative)
                     for error, before in zip(found, made._before, strict=True))

    made._errors = errors
    for report in run(made):
        same = all(torch.equal(value, before[key]) for key, value in network.state_dict().items()
                   if key.startswith(f"{report.name}."))
        if report.name in worse:
            assert same and not report.kept and report.changed == 0
        assert report.kept or same


def test_layers_with_too_large_a_hessian_keep_their_rounding(toy, quantized, calibration_set, tmp_path):
    network = quantized(4)
    before = copy.deepcopy(network.state_dict())
    reports = run(reconstruction(network, toy, calibration_set, tmp_path, hessian_bytes=8 * 53**2))
    details = {f"{r.name}.{d.layer}".rstrip("."): d for r in reports for d in r.details}
    left = [name for name, detail in details.items() if "hessian_gb" in detail.note]
    assert left == [name for name in details if ".conv" in name or name == "conv_out"]  # 6 * 9 columns
    assert all(torch.equal(network.state_dict()[f"{name}.weight"], before[f"{name}.weight"]) for name in left)
    assert all(detail.note or detail.after < detail.before for detail in details.values())
    assert sum(not detail.note for detail in details.values()) >= 2


class Attention(nn.Module):
    """q, k and v of one tensor, in two heads of nothing; a depthwise convolution behind it."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)

    def forward(self, x):
        tokens = x.flatten(2).mT
        attended = torch.softmax(self.q(tokens) @ self.k(tokens).mT, -1) @ self.v(tokens)
        return self.depthwise(self.out(attended).mT.reshape(x.shape))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.block, self.last = nn.Conv2d(1, 6, 1), Attention(), nn.Conv2d(6, 1, 1)

    def forward(self, x, t, y=None):
        return self.last(self.block(self.first(x)))


def test_layers_that_read_the_same_tensor_take_one_pass(calibration_set, tmp_path, monkeypatch):
    torch.manual_seed(0)
    full = Net().eval().requires_grad_(False)
    network = copy.deepcopy(full)
    quantize_(network, Policy(first=(), last=(), attention=False).rules(Widths(4, 8)), EXAMPLE)
    calibrate_weights_(network, "minmax")
    calibrate_activations_(network, "minmax", [(x, t) for x, t, _ in calibration_set.batches(16)])
    passes = []
    add = InputHessian.add
    monkeypatch.setattr(InputHessian, "add", lambda self, x: (passes.append(self.layer), add(self, x))[1])
    made = reconstruction(network, full, calibration_set, tmp_path, patterns=("block",))
    made.blocks = made.blocks[1:2]
    calls = []
    made.begin()
    handle = network.block.register_forward_pre_hook(lambda *_: calls.append(1))
    for _ in range(made.iterations):
        made.step()
    handle.remove()
    assert made.block.layers == ("q", "k", "v", "out", "depthwise")
    # a look and a pass for q, k and v together, for out and for depthwise; 35 rows are one batch
    assert len(calls) == 6
    assert [passes.count(getattr(network.block, name)) for name in made.block.layers] == [1] * 5
    report = made.end()
    assert report.details[4].inputs == 35 * 36 and report.details[0].inputs == 35 * 36
    assert all(detail.after < detail.before for detail in report.details)


def test_bins_of_steps_and_layers_of_the_time(toy, tmp_path, calibration_set):
    """Each sample's input is quantized by the ranges of its own step, and layers of the time see every time."""
    x, steps = calibration_set.x, torch.arange(40) % 2
    states = CalibrationSet(x * (1 + 30 * steps.numpy()[:, None, None, None]).astype("float32"), steps.numpy(),
                            calibration_set.t, calibration_set.evaluations)
    network = copy.deepcopy(toy)
    quantize_(network, Policy(first=(), last=(), attention=False).rules(Widths(4, 8), bins=2), EXAMPLE)
    calibrate_weights_(network, "minmax")
    for row in (0, 1):
        select_row(network, row)
        chosen = states.take((steps == row).numpy().nonzero()[0])
        calibrate_activations_(network, "minmax", [(x, t) for x, t, _ in chosen.batches(20)])
    times = ["embed", "resnets.0.time", "resnets.1.time"]
    batch = (torch.zeros(4, 1, 6, 6), torch.tensor([10.0, 400.0, 700.0, 900.0]))
    blocks = [
        *find_time_blocks(network, toy, times, [batch], torch.tensor([0, 0, 1, 1])),
        *find_blocks(network, ("*resnets.*",), EXAMPLE, times),
    ]
    made = Reconstruction(network, toy, blocks, states, GPTQSettings(), seed=0, batch_size=16, cache_bytes=1e9,
                          folder=tmp_path, row_of_step=torch.tensor([0, 1]))
    reports = run(made)
    assert [detail.inputs for detail in reports[0].details] == [4, 4, 4]
    training = split(states)[0]
    seen = []
    handle = network.conv_in.input_quantizer.register_forward_hook(lambda _, __, y: seen.append(y))
    with of_samples(network, torch.from_numpy(training.step)):
        network(torch.from_numpy(training.x), torch.from_numpy(training.t))
    handle.remove()
    error = copy.deepcopy(toy.conv_in)
    error.weight.copy_(toy.conv_in.weight - network.conv_in.weight)
    error.bias.zero_()
    report = next(report for report in reports if report.name == "conv_in")
    value = report.details[0].after if report.kept else report.details[0].before
    assert value * report.details[0].inputs == pytest.approx(float(error(seen[0]).double().square().sum()), rel=1e-4)
