"""Layers that depend on the time alone: cut out of the network, and reconstructed together on all times there are."""

import copy

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from ptq_exp.calibration import CalibrationSet
from ptq_exp.diffusion.denoisers import DiTDenoiser
from ptq_exp.diffusion.zoo.registry import load_model
from ptq_exp.errors import QuantizationError
from ptq_exp.quantization import (
    Policy,
    Widths,
    calibrate_activations_,
    calibrate_weights_,
    depending_on_alone,
    quantize_,
    select_row,
    set_mode,
)
from ptq_exp.reconstruction import (
    Annealing,
    Reconstruction,
    Settings,
    find_blocks,
    find_time_blocks,
    reconstruction_loss,
)

EXAMPLE = (torch.zeros(1, 1, 6, 6), torch.zeros(1))
LAYERS = ["embed", "resnets.0.time", "resnets.1.time"]
TIMES = torch.tensor([900.0, 700.0, 350.0, 100.0, 20.0])
ROWS = torch.tensor([0, 0, 1, 1, 1])


def batches(times=TIMES):
    return [(EXAMPLE[0].expand(len(part), -1, -1, -1), part, None) for part in times.split(3)]


@pytest.fixture(scope="module")
def samples() -> CalibrationSet:
    rng = np.random.default_rng(0)
    step = np.arange(40) % 5
    x = rng.standard_normal((40, 1, 6, 6), dtype=np.float32)
    return CalibrationSet(x, step, TIMES.numpy()[step], np.zeros(40, int))


@pytest.fixture
def network(toy, samples):
    """Two bins; the time layers are calibrated on the samples, too."""
    quantized = copy.deepcopy(toy)
    quantize_(quantized, Policy(first=(), last=(), attention=False).rules(Widths(3, 4), bins=2), EXAMPLE)
    calibrate_weights_(quantized, "minmax")
    for row in (0, 1):
        select_row(quantized, row)
        chosen = samples.take((ROWS.numpy()[samples.step] == row).nonzero()[0])
        calibrate_activations_(quantized, "minmax", [(x, t) for x, t, _ in chosen.batches(16)])
    return quantized


def reconstruction(network, toy, samples, folder, *, joint=True, iterations=60, step_lr=5e-3, inner_weight=0.0):
    blocks = [
        *find_time_blocks(network, toy, LAYERS, batches(), ROWS, joint=joint),
        *find_blocks(network, ("*resnets.*",), EXAMPLE, LAYERS),
    ]
    settings = Settings(Annealing(iterations), batch_size=16, lr=0.05, step_lr=step_lr, inner_weight=inner_weight)
    return Reconstruction(
        network, toy, blocks, samples, settings, seed=0, batch_size=16, cache_bytes=1e9, folder=folder, row_of_step=ROWS
    )


def run_block(made):
    made.begin()
    for _ in range(made.settings.annealing.iterations):
        made.step()
    return made.end()


@torch.no_grad()
def outputs(network, rows=None):
    """What embedding and two projections make of each time, alone at its row; [5, 4 + 12]."""
    found = []
    handles = [
        network.get_submodule(name).register_forward_hook(lambda _, args, y: found.append(y)) for name in LAYERS
    ]
    for n, t in enumerate(TIMES):
        if rows is not None:
            select_row(network, int(rows[n]))
        network(EXAMPLE[0], t[None])
    for handle in handles:
        handle.remove()
    return torch.cat([torch.cat(found[n::3]) for n in range(3)], 1)


def projections(network, rows=None):
    """Of these, what the projections make; [5, 12]."""
    return outputs(network, rows)[:, 4:]


def test_the_part_is_found_with_the_functions_between_its_layers(toy, network):
    assert depending_on_alone(toy, (torch.randn(1, 1, 6, 6), torch.zeros(1)), 1) == LAYERS
    (block,) = find_time_blocks(network, toy, LAYERS, batches(), ROWS)
    assert list(block.plan.roots) == ["embed"] and list(block.plan.leaves) == LAYERS[1:]
    assert [step.layer or step.function for step in block.plan.steps] == ["embed", torch.tanh, *LAYERS[1:]]
    read = torch.stack([TIMES / 1000, torch.cos(TIMES)], 1)
    torch.testing.assert_close(block.module(toy)(read), projections(toy))
    assert block.modules(network) == [network.get_submodule(name) for name in LAYERS]


@pytest.mark.parametrize(("name", "n_layers"), [("digits", 19), ("digits_ldm", 10)])
def test_of_the_embedded_models_every_projection_hangs_on_the_first_layer(name, n_layers):
    model = load_model(name)
    layers = depending_on_alone(model.denoiser, model.example_inputs(), 1)
    quantized = model.copy_denoiser()
    quantize_(quantized, Policy().rules(Widths(4, 8)), model.example_inputs())
    whole = [model.example_inputs().expanded(3)._replace(t=TIMES[:3])]
    (block,) = find_time_blocks(quantized, model.denoiser, layers, whole)
    assert len(block.layers) == n_layers and len(block.plan.leaves) == n_layers - 2
    assert [root.rpartition(".")[2] for root in block.plan.roots] == ["linear_1"]
    calls = block.capture(model.denoiser, torch.device("cpu"), output=True)  # compares with the network itself
    assert calls.output.shape[0] == 3 and float(calls.output.std()) > 0.01


def test_it_sees_every_time_once_at_its_own_row(toy, network, samples, tmp_path):
    made = reconstruction(network, toy, samples, tmp_path)
    expected = float((projections(network, ROWS) - projections(toy)).square().mean())
    made.begin()
    data = made.current.data
    torch.testing.assert_close(data.full.tensors[0], torch.stack([TIMES / 1000, torch.cos(TIMES)], 1))
    assert torch.equal(data.quantized.tensors[0], data.full.tensors[0]) and torch.equal(data.full.step_rows, ROWS)
    torch.testing.assert_close(data.full.output, projections(toy))
    assert made._before[0].mse == pytest.approx(expected, rel=1e-5)
    assert abs(expected - float((projections(network, 1 - ROWS) - projections(toy)).square().mean())) > 1e-3 * expected


@pytest.mark.parametrize("inner_weight", [0.0, 0.5])
def test_its_loss_is_the_sum_of_the_losses_of_all_projections(inner_weight, toy, network, samples, tmp_path):
    made = reconstruction(network, toy, samples, tmp_path, inner_weight=inner_weight)
    made.begin()
    relaxed, rounding = copy.deepcopy(network), made.current.rounding
    for name, weight in zip(LAYERS, rounding.soft(rounding.h().detach()), strict=True):
        relaxed.get_submodule(name).weight.copy_(weight)
    loss = made.step()
    found, wanted = outputs(relaxed, ROWS).split([4, 6, 6], 1), outputs(toy).split([4, 6, 6], 1)
    inner, *parts = (float(reconstruction_loss(one, other)) for one, other in zip(found, wanted, strict=True))
    assert float(loss) == pytest.approx(sum(parts) + inner_weight * inner, rel=1e-5) and min(inner, *parts) > 0


@pytest.mark.parametrize("joint", [True, False])
def test_projections_come_closer_at_the_times_of_the_sampler(joint, toy, network, samples, tmp_path):
    made = reconstruction(network, toy, samples, tmp_path, joint=joint)
    names = [block.name for block in made.blocks]
    assert names[: 1 if joint else 3] == (["layers of the time"] if joint else LAYERS)
    before = float((projections(network, ROWS) - projections(toy)).square().mean())
    others = {name: value.clone() for name, value in network.state_dict().items() if "embed" not in name}
    reports = [run_block(made) for _ in names[: 1 if joint else 3]]
    after = float((projections(network, ROWS) - projections(toy)).square().mean())
    assert after < 0.7 * before and sum(report.layers for report in reports) == 3
    if joint:
        assert reports[0].kept and reports[0].after_quantized.mse == pytest.approx(after, rel=1e-4)
    changed = {name for name, value in others.items() if not torch.equal(network.state_dict()[name], value)}
    assert changed and all(".time." in name for name in changed)


def test_residual_blocks_leave_it_alone(toy, network, samples, tmp_path):
    made = reconstruction(network, toy, samples, tmp_path, iterations=5, step_lr=0.1)
    residual = next(block for block in made.blocks if block.name == "resnets.0")
    assert residual.layers == ("conv1", "conv2") and residual.elsewhere == ("time",)
    assert set(residual.quantizers(network)) == {"conv1.input_quantizer", "conv2.input_quantizer"}
    run_block(made)
    of_time = {name: value.clone() for name, value in network.state_dict().items() if ".time." in name or "emb" in name}
    for _ in made.remaining:
        run_block(made)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in of_time.items())
    assert sum(report.layers for report in made.reports) == 9 and any(report.kept for report in made.reports[1:])


def test_continued_after_it_the_reconstruction_is_the_same(toy, network, samples, tmp_path):
    whole = reconstruction(network, toy, samples, tmp_path, iterations=4)
    first = run_block(whole)
    quantized = copy.deepcopy(network)
    run_block(whole)
    resumed = reconstruction(quantized, toy, samples, tmp_path, iterations=4)
    resumed.reports = [first]
    run_block(resumed)
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in quantized.state_dict().items())


class Odd(nn.Module):
    """Two layers of the time, with something in between that a part cannot follow or repeat."""

    def __init__(self, between):
        super().__init__()
        self.one, self.two, self.conv = nn.Linear(2, 4), nn.Linear(4, 4), nn.Conv2d(1, 4, 1)
        self.between = between

    def forward(self, x, t, y=None):
        temb = self.between(self, self.one(torch.stack([t, t.cos()], 1)))
        return self.conv(x) + self.two(temb)[:, :, None, None]


def quantized_odd(between):
    torch.manual_seed(0)
    net = Odd(between).eval().requires_grad_(False)
    quantized = copy.deepcopy(net)
    quantize_(quantized, Policy(first=(), last=(), attention=False).rules(Widths(4, 8)), EXAMPLE)
    return net, quantized


def test_a_layer_behind_anything_else_reads_an_input_of_its_own():
    net, quantized = quantized_odd(lambda net, h: h + net.conv.bias)
    (block,) = find_time_blocks(quantized, net, ["one", "two"], batches(TIMES[:2]))
    assert list(block.plan.roots) == list(block.plan.leaves) == ["one", "two"]
    calls = block.capture(net, torch.device("cpu"), output=True)
    assert [tensor.shape[1] for tensor in calls.tensors] == [2, 4] and calls.output.shape == (2, 8)


@pytest.mark.parametrize("between", [
    lambda net, h: h.roll(1, 0), lambda net, h: torch.cat(torch.split(h, [1, len(h) - 1])[::-1]),
], ids=["a batch that is mixed", "a batch of another size"])
def test_functions_bound_to_a_batch_are_refused(between):
    net, quantized = quantized_odd(between)
    (block,) = find_time_blocks(quantized, net, ["one", "two"], batches(TIMES))
    with pytest.raises(QuantizationError, match=r"one and what follows.*time_layers=calibration_set"):
        block.capture(net, torch.device("cpu"), output=True)


def test_a_layer_called_twice_is_refused():
    net, quantized = quantized_odd(lambda net, h: net.two(h))
    with pytest.raises(QuantizationError, match="two is called more than once.*time_layers=calibration_set"):
        find_time_blocks(quantized, net, ["one", "two"], batches(TIMES))


def test_without_quantized_layers_there_is_no_block(toy):
    assert find_time_blocks(toy, toy, LAYERS, batches()) == []


class Again(nn.Module):
    """As a DiT: the embedding of the time, in the first block, is asked again at the end."""

    def __init__(self, second=lambda t: t):
        super().__init__()
        self.one, self.two = nn.Linear(2, 4), nn.Linear(4, 4)
        self.scale, self.last, self.conv = nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv2d(1, 4, 1)
        self.second = second

    def embedding(self, t):
        return self.two(torch.tanh(self.one(torch.stack([t / 1000, t.cos()], 1))))

    def forward(self, x, t, y=None):
        h = self.conv(x) * self.scale(self.embedding(t))[:, :, None, None]
        return h + self.last(self.embedding(self.second(t)))[:, :, None, None]


AGAIN = ["one", "two", "scale", "last"]


def quantized_again(second=lambda t: t):
    torch.manual_seed(0)
    net = Again(second).eval().requires_grad_(False)
    quantized = copy.deepcopy(net)
    quantize_(quantized, Policy(first=(), last=(), attention=False).rules(Widths(3, 8)), EXAMPLE)
    return net, quantized


def test_a_layer_called_again_on_the_same_times_is_one_step():
    net, quantized = quantized_again()
    (block,) = find_time_blocks(quantized, net, AGAIN, batches())
    assert [step.layer for step in block.plan.steps if step.layer] == AGAIN
    assert [step.function for step in block.plan.steps if step.layer is None] == [torch.tanh]
    assert list(block.plan.roots) == ["one"] and list(block.plan.leaves) == ["scale", "last"]
    calls = block.capture(net, torch.device("cpu"), output=True)
    assert calls.tensors[0].shape == (5, 2)
    embedded = net.embedding(TIMES)
    torch.testing.assert_close(calls.output, torch.cat([net.scale(embedded), net.last(embedded)], 1))
    again = block.capture(quantizers_off(quantized), torch.device("cpu"), output=False)
    assert torch.equal(again.tensors[0], calls.tensors[0])


def quantizers_off(quantized):
    set_mode(quantized, "off")
    return quantized


@pytest.mark.parametrize("second", [lambda t: t + 1, lambda t: t.clamp(max=800)], ids=["at once", "at some times"])
def test_a_layer_called_again_on_other_times_is_refused(second):
    net, quantized = quantized_again(second)
    with pytest.raises(QuantizationError, match="one is called more than once.*time_layers=calibration_set"):
        # the first batch holds the time 900, the second none above 800
        (block,) = find_time_blocks(quantized, net, AGAIN, batches(TIMES.flip(0)))
        block.capture(net, torch.device("cpu"), output=True)


@pytest.mark.parametrize("joint", [True, False])
def test_a_dit_is_reconstructed_on_all_times(joint, tmp_path):
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=2, sample_size=6,
        num_embeds_ada_norm=3,
    )
    net = DiTDenoiser(transformer, 3).eval().requires_grad_(False)
    example = (*EXAMPLE, torch.zeros(1, dtype=torch.long))
    rng = np.random.default_rng(0)
    step = np.arange(16) % 5
    samples = CalibrationSet(
        rng.standard_normal((16, 1, 6, 6), dtype=np.float32), step, TIMES.numpy()[step], np.zeros(16, int),
        {"y": step % 3}, {"y": np.array(3)},
    )
    quantized = copy.deepcopy(net)
    quantize_(quantized, Policy(first=("*pos_embed.proj",), last=("*proj_out_2",)).rules(Widths(3, 8)), example)
    calibrate_weights_(quantized, "minmax")
    calibrate_activations_(quantized, "minmax", samples.batches(8))
    layers = depending_on_alone(net, example, 1)
    assert len(layers) == 4 and all("timestep_embedder" in name for name in layers)
    times = [(EXAMPLE[0].expand(5, -1, -1, -1), TIMES, torch.zeros(5, dtype=torch.long))]
    blocks = [
        *find_time_blocks(quantized, net, layers, times, joint=joint),
        *find_blocks(quantized, ("*transformer_blocks.*",) if joint else (), example, layers),
    ]
    made = Reconstruction(
        quantized, net, blocks, samples, Settings(Annealing(3), batch_size=4), seed=0, batch_size=8, cache_bytes=1e9,
        folder=tmp_path,
    )
    reports = [run_block(made) for _ in made.remaining]
    # of each block 4 in attention, 2 in the feed-forward, 1 behind the embedding and 2 in it; the patches; 2 at the end
    assert len(reports) == (1 + 2 + 3 if joint else 21) and sum(report.layers for report in reports) == 2 * 9 + 3


def test_a_block_called_again_on_the_same_input_is_one_block():
    net, quantized = quantized_again()
    calibrate_weights_(quantized, "minmax")
    assert [block.name for block in find_blocks(quantized, (), EXAMPLE)] == ["conv", "one", "two", "scale", "last"]
    net, quantized = quantized_again(lambda t: t + 1)
    calibrate_weights_(quantized, "minmax")
    with pytest.raises(QuantizationError, match="one is called 2 times on different inputs.*keep_fp"):
        find_blocks(quantized, (), EXAMPLE)
