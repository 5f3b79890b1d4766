"""The optimisation of one block: it finds what is best, stays on the grid, and leaves no other trace."""

import copy
import itertools

import pytest
import torch
from torch import nn

from ptq_exp.errors import ConfigError
from ptq_exp.quantization import (
    PerChannel,
    Policy,
    QuantSpec,
    Rule,
    Segments,
    TensorSpec,
    Widths,
    calibrate_weights_,
    fake_quantize,
    quantize_,
)
from ptq_exp.quantization.quantizer import ActivationQuantizer, Quantizer
from ptq_exp.reconstruction import (
    Annealing,
    Block,
    BlockData,
    BlockOptimisation,
    Calls,
    Settings,
    StepSizes,
    block_error,
    dropping,
)


class Net(nn.Module):
    """One layer, or several in a row."""

    def __init__(self, *layers):
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x):
        return self.body(x)


def pair(*layers, weight=2, **spec):
    """(full-precision network, its copy with quantized weights)."""
    full = Net(*layers).requires_grad_(False)
    quantized = Net(*[type(layer)(*_arguments(layer)) for layer in layers]).requires_grad_(False)
    quantized.load_state_dict(full.state_dict())
    x = torch.zeros(1, *_input_shape(layers[0]))
    of_weight = TensorSpec(weight, **{"granularity": PerChannel()} | spec)
    quantize_(quantized, [Rule("*", QuantSpec(weight=of_weight))], (x,))
    calibrate_weights_(quantized, "minmax")
    return full, quantized


def _arguments(layer):
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features, layer.bias is not None
    return layer.in_channels, layer.out_channels, layer.kernel_size, 1, layer.padding


def _input_shape(layer):
    if isinstance(layer, nn.Linear):
        return (layer.in_features,)
    return (layer.in_channels, *[5] * (layer.weight.ndim - 2))


def optimised(full, quantized, x, iterations=200, layers=("0",), **settings):
    calls = Calls.of((x,), {}, full.body(x))
    settings = Settings(Annealing(iterations), **{"lr": 0.05, "batch_size": len(x)} | settings)
    found = BlockOptimisation(Block("body", layers), quantized, full, BlockData(calls, calls), settings, seed=0)
    for _ in range(iterations):
        found.step()
    return found


def integer_weights(layer):
    cells = layer.weight_quantizer.cells(layer.weight)
    return layer.weight / cells.scale + cells.zero_point, cells


def test_a_pair_of_weights_finds_the_optimum_that_nearest_rounding_misses():
    full = nn.Linear(2, 2, bias=False)
    # on equal inputs only the sum of a row counts: 0.45 + 0.35 (in steps) is better met by 1 + 0 than by 0 + 0
    full.weight.data = torch.tensor([[0.45, 0.35], [-1.0, 2.0]])
    full, quantized = pair(full)
    quantized.body[0].weight_quantizer.scale.fill_(1.0)
    quantized.body[0].weight_quantizer.zero_point.fill_(1.0)
    quantized.body[0].weight.copy_(torch.tensor([[0.0, 0.0], [-1.0, 2.0]]))
    x = torch.linspace(-1, 1, 16)[:, None].repeat(1, 2)
    found = optimised(full, quantized, x)
    found.apply()
    assert quantized.body[0].weight[0].sum() == 1 and quantized.body[0].weight[1].tolist() == [-1, 2]
    assert found.changed() == 0.25


def test_it_comes_close_to_brute_force_and_beats_nearest_rounding():
    torch.manual_seed(1)
    full, quantized = pair(nn.Linear(6, 1))
    x = torch.randn(64, 6) @ torch.randn(6, 6)  # correlated inputs
    target, layer = full.body(x), quantized.body[0]
    nearest = float((quantized.body(x) - target).square().mean())
    cells = layer.weight_quantizer.cells(layer.weight)
    floor = (full.body[0].weight / cells.scale).floor()
    errors = []
    for up in itertools.product([0.0, 1.0], repeat=6):
        level = (floor + torch.tensor([up])).clamp(cells.qmin - cells.zero_point, cells.qmax - cells.zero_point)
        y = nn.functional.linear(x, level * cells.scale, layer.bias)
        errors.append(float((y - target).square().mean()))
    found = optimised(full, quantized, x, iterations=400)
    found.apply()
    learned = float((quantized.body(x) - target).square().mean())
    assert learned <= nearest and learned <= sorted(errors)[3] * (1 + 1e-5)


@pytest.mark.parametrize(
    ("layer", "spec"),
    [
        (nn.Linear(6, 5), {}),
        (nn.Linear(6, 5), {"granularity": Segments((2, 4), PerChannel())}),
        (nn.Conv2d(4, 3, 3, padding=1), {}),
        (nn.Conv2d(4, 3, 3, padding=1), {"granularity": Segments((1, 3), PerChannel()), "symmetric": True}),
        (nn.Conv1d(4, 3, 3, padding=1), {"granularity": "tensor"}),
    ],
)
def test_every_kind_of_layer_and_range_stays_on_its_grid_next_to_nearest(layer, spec):
    torch.manual_seed(0)
    layer.reset_parameters()
    full, quantized = pair(layer, weight=4, **spec) if "granularity" not in spec else pair_per_tensor(layer)
    x = torch.randn(16, *_input_shape(layer)) + 2  # correlated: of independent inputs nearest rounding is the best
    before, _ = integer_weights(quantized.body[0])
    found = optimised(full, quantized, x, iterations=30, lr=0.2)
    found.apply()
    after, cells = integer_weights(quantized.body[0])
    exact = torch.div(full.body[0].weight, cells.scale).floor()
    assert torch.equal(quantized.body[0].weight, fake_quantize(quantized.body[0].weight, *cells))
    assert (after.round() - before.round()).abs().max() <= 1 and found.changed() > 0
    level = (quantized.body[0].weight / cells.scale).round()
    clamped = [(exact + up).clamp(cells.qmin - cells.zero_point, cells.qmax - cells.zero_point) for up in (0, 1)]
    assert ((level == clamped[0]) | (level == clamped[1])).all()
    found.revert()
    assert torch.equal(integer_weights(quantized.body[0])[0], before)


def pair_per_tensor(layer):
    full = Net(layer).requires_grad_(False)
    quantized = Net(type(layer)(*_arguments(layer))).requires_grad_(False)
    quantized.load_state_dict(full.state_dict())
    quantize_(quantized, [Rule("*", QuantSpec(weight=TensorSpec(4)))], (torch.zeros(1, *_input_shape(layer)),))
    calibrate_weights_(quantized, "minmax")
    return full, quantized


def test_the_network_is_unchanged_until_apply():
    torch.manual_seed(0)
    full, quantized = pair(nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1), weight=3)
    x = torch.randn(8, 2, 5, 5) + 2
    state = {key: value.clone() for key, value in quantized.state_dict().items()}
    found = optimised(full, quantized, x, layers=("0", "1"), inner_weight=0.5)
    assert all(torch.equal(value, state[key]) for key, value in quantized.state_dict().items())
    assert not any(module._forward_hooks for module in [*quantized.modules(), *full.modules()])
    before = block_error(quantized.body, found.data.full, found.data.full.output, "body")
    found.apply()
    assert block_error(quantized.body, found.data.full, found.data.full.output, "body").mse < before.mse


def test_half_precision_is_of_the_multiplications_alone():
    torch.manual_seed(0)
    full, quantized = pair(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1), weight=3)
    x = torch.randn(32, 4, 5, 5) + 2
    kinds = []
    quantized.body[0].register_forward_hook(lambda layer, args, y: kinds.append((args[0].dtype, y.dtype)))
    found = optimised(full, quantized, x, iterations=60, lr=0.1, layers=("0", "1"), inner_weight=0.5, half=True)
    assert set(kinds) == {(torch.float32, torch.bfloat16)} and found.rounding.v.dtype == torch.float32
    kinds.clear()
    nearest = block_error(quantized.body, found.data.full, found.data.full.output, "body").mse
    found.apply()
    half = block_error(quantized.body, found.data.full, found.data.full.output, "body").mse
    assert set(kinds) == {(torch.float32, torch.float32)}
    found.revert()
    other = optimised(full, quantized, x, iterations=60, lr=0.1, layers=("0", "1"), inner_weight=0.5)
    other.apply()
    whole = block_error(quantized.body, found.data.full, found.data.full.output, "body").mse
    assert whole < 0.7 * nearest and half < 0.7 * nearest and half < 1.25 * whole
    layer = quantized.body[0]
    assert torch.equal(layer.weight, fake_quantize(layer.weight, *layer.weight_quantizer.cells(layer.weight)))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_a_network_of_another_type_multiplies_in_it(kind):
    torch.manual_seed(0)
    layers = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Conv2d(4, 3, 3, padding=1)
    full, x = Net(*layers).to(kind).requires_grad_(False), torch.randn(32, 4, 5, 5, dtype=kind) + 2
    quantized = copy.deepcopy(full)
    spec = QuantSpec(weight=TensorSpec(4, granularity=PerChannel()))
    quantize_(quantized, [Rule("*", spec)], (x[:1],))
    calibrate_weights_(quantized, "minmax")
    found, other = (optimised(full, quantized, x, layers=("0", "2"), half=half) for half in (True, False))
    assert torch.equal(found.rounding.v, other.rounding.v) and found.loss == other.loss
    found.apply()
    for n in (0, 2):  # refused where a weight is not on the grid of its ranges
        layer = quantized.body[n]
        assert layer.weight_quantizer.integers(layer.weight).shape == layer.weight.shape


def quantizer(bits=4, rows=1, segments=None):
    made = ActivationQuantizer(bits, symmetric=False, segments=segments, name="q")
    made.scale.fill_(0.1), made.zero_point.fill_(7), made.qmax.fill_(15)
    made.calibrated.fill_(True)
    made.ready = True
    return made


def test_step_sizes_are_learned_by_straight_through_gradients():
    q = quantizer(segments=(1, 2))
    steps = StepSizes({"q": q})
    x = torch.tensor([[0.231, -0.9, 0.4]])
    scale = steps.scales()["q.scale"]
    out = torch.func.functional_call(q, {"scale": scale}, (x,))
    out.sum().backward()
    # d/dscale: rounded level - x / scale inside, the clamped level outside; here times the start, 0.1
    assert steps.factors.grad.tolist() == pytest.approx([0.1 * (2 - 2.31), 0.1 * (-7 + (4 - 4.0))], abs=1e-5)
    assert q.scale.tolist() == [[pytest.approx(0.1)] * 2]


def test_step_sizes_of_candidate_widths_cannot_be_learned():
    with pytest.raises(ConfigError, match=r"q has the candidate widths \(4, 8\).*set reconstruction.step_lr=0"):
        StepSizes({"q": quantizer((4, 8))})


def test_drop_keeps_a_share_of_the_elements_full_and_ends_with_its_context():
    q, x = quantizer(), torch.randn(1000) / 3
    rounded = q(x)
    with dropping({"q": q}, 0.3, torch.Generator().manual_seed(0)):
        mixed = q(x)
    assert ((mixed == x) | (mixed == rounded)).all()
    assert 0.25 < float((mixed == x).float().mean()) < 0.35
    assert torch.equal(q(x), rounded)
    with dropping({"q": q}, 0.0, torch.Generator()):
        assert torch.equal(q(x), rounded) and q.kept is None


def test_learned_steps_and_drop_lower_the_error_of_a_block():
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8), nn.Linear(8, 8)]
    full = Net(*layers).requires_grad_(False)
    quantized = Net(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    quantized.load_state_dict(full.state_dict())
    x = torch.randn(64, 8)
    quantize_(quantized, Policy(first=(), last=(), attention=False).rules(Widths(4, 4)), (x[:1],))
    calibrate_weights_(quantized, "minmax")
    for module in quantized.modules():
        if isinstance(module, Quantizer) and not module.ready:
            module.scale.fill_(0.9), module.zero_point.fill_(7), module.qmax.fill_(15)  # far too wide
            module.calibrated.fill_(True)
            module.ready = True
    before = float((quantized(x) - full(x)).square().mean())
    found = optimised(full, quantized, x, layers=("0", "1"), step_lr=0.02, drop_prob=0.5, input_prob=0.5)
    found.apply()
    assert float((quantized(x) - full(x)).square().mean()) < 0.5 * before
    assert all(float(layer.input_quantizer.scale) < 0.9 for layer in quantized.body)
    found.revert()
    assert float((quantized(x) - full(x)).square().mean()) == before


def test_two_optimisations_are_the_same_and_another_seed_is_not():
    torch.manual_seed(0)
    full, quantized = pair(nn.Linear(4, 4), weight=3)
    x = torch.randn(32, 4)
    settings = {"batch_size": 4, "input_prob": 0.5, "iterations": 10}
    first, second = (optimised(full, quantized, x, **settings) for _ in range(2))
    assert torch.equal(first.rounding.v, second.rounding.v) and first.loss == second.loss
    calls = Calls.of((x,), {}, full.body(x))
    other = BlockOptimisation(Block("body", ("0",)), quantized, full, BlockData(calls, calls), first.settings, seed=1)
    for _ in range(10):
        other.step()
    assert not torch.equal(first.rounding.v, other.rounding.v)
