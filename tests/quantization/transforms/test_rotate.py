"""Rotation: numbers of the reference, an unchanged function, blocks that fit, and what the report counts."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ptq_exp.errors import ConfigError
from ptq_exp.quantization import (
    Applied,
    Fitting,
    Policy,
    Rule,
    Widths,
    applied_from_dict,
    applied_to,
    calibrate_,
    describe,
    load_quantized_,
    proven,
    quantize_,
    save_quantized,
    transforms_of,
)
from ptq_exp.quantization.online import online_parts
from ptq_exp.quantization.transforms.rotate import Rotate

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "kit" / "rotation.npz")


def golden(key):
    return torch.from_numpy(GOLDEN[key]).double()


def rotate_(network, x, transform=None, rules=None):
    transform = transform or Rotate()
    sites = transform.find(network, (x[:1],))
    sites = sites if rules is None else transform.chosen(sites, rules)
    return applied_to(network, (x[:1],), Applied(transform, sites, left=transform.left(network, (x[:1],))))


class Net(nn.Module):
    """x [N, 8, 6, 6]: strided, grouped and 1x1 convolutions, a concatenation, tokens, a layer of 6 channels."""

    def __init__(self):
        super().__init__()
        self.conv, self.down = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 3, 2, 1)
        self.depthwise, self.shortcut = nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.Conv2d(36, 6, 1)
        self.narrow, self.tokens, self.back = nn.Conv2d(6, 16, 1), nn.Linear(16, 12), nn.Linear(12, 8)

    def forward(self, x):
        y = torch.relu(self.conv(x))
        y = self.depthwise(self.down(y))
        y = self.shortcut(torch.cat([y, y[:, :4], y], 1))
        tokens = torch.relu(self.narrow(y)).flatten(2).transpose(1, 2)
        return self.back(torch.relu(self.tokens(tokens)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().double().eval().requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(5, 8, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(("case", "group"), [("K96G16", 256), ("K128G64", 64)])
def test_a_linear_layer_as_in_the_reference(case, group):
    w, x, b = (golden(f"linear/{case}/{key}") for key in "wxb")
    layer = nn.Sequential(nn.Linear(w.shape[1], len(w)).double().requires_grad_(False))
    layer[0].weight.copy_(w)
    layer[0].bias.copy_(b)
    made = rotate_(layer, x, Rotate(group))
    assert list(made.sites) == [case.partition("G")[2]]
    torch.testing.assert_close(layer[0].weight, golden(f"linear/{case}/w_rot"), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer[0].online(x), golden(f"linear/{case}/x_rot"), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(x), golden(f"linear/{case}/y_fp"), rtol=0, atol=1e-12)


def test_a_convolution_as_in_the_reference():
    layer = nn.Sequential(nn.Conv2d(16, 6, 3, padding=1, bias=False).double().requires_grad_(False))
    layer[0].weight.copy_(golden("conv/w"))
    x = golden("conv/x")
    rotate_(layer, x)
    torch.testing.assert_close(layer[0].weight, golden("conv/w_rot_channels"), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer[0].online(x), golden("conv/x_rot_channels"), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(x), golden("conv/y"), rtol=0, atol=1e-12)


def test_rotation_lowers_the_error_of_8_bits_where_channels_stand_out():
    w, x = golden("linear/K512G256/w"), golden("linear/K512G256/x")
    layer = nn.Sequential(nn.Linear(512, len(w), bias=False).double().requires_grad_(False))
    layer[0].weight.copy_(w)
    rotate_(layer, x)
    errors = []
    for matrices in ((w, x), (layer[0].weight, layer[0].online(x))):
        rounded = [(m / (s := m.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127)).round() * s for m in matrices]
        errors.append(float((rounded[1] @ rounded[0].T - x @ w.T).norm() / (x @ w.T).norm()))
    assert errors[1] < 0.4 * errors[0]


@pytest.mark.parametrize("group", [4, 16, 256])
def test_the_function_stays_to_double_precision(net, x, group):
    before = copy.deepcopy(net)
    made = rotate_(net, x, Rotate(group))
    torch.testing.assert_close(net(x), before(x), rtol=0, atol=1e-12)
    for layers in made.sites.values():
        assert all(not torch.equal(net.get_submodule(n).weight, before.get_submodule(n).weight) for n in layers)


def test_blocks_are_the_largest_that_fit_and_cross_no_part_of_a_concatenation(net, x):
    made = rotate_(net, x)
    assert made.sites == {"16": ("down", "tokens"), "4": ("conv", "shortcut", "back")}  # 36 = 16 + 4 + 16
    assert made.left == {"narrow": "not rotated: no block of 4 or more divides its 6 input channels"}
    assert applied_from_dict(made.to_dict()).left == made.left


def test_layers_that_are_skipped_or_stay_in_full_precision_are_left_alone(net, x):
    rules = [Rule("conv", None, "kept"), *Policy(attention=False, first=(), last=()).rules(Widths(4, 4))]
    made = rotate_(net, x, Rotate(skip=["to*", "back"]), rules)
    assert made.sites == {"16": ("down",), "4": ("shortcut",)}


def test_a_weight_that_others_read_is_not_turned():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x)) + nn.functional.linear(x, self.c.weight) + self.c(x)

    x = torch.randn(2, 4)
    assert Rotate().find(Tied().eval(), (x[:1],)) == {}


def test_the_report_counts_the_size_of_the_block_for_each_element(net, x):
    before = describe(net, (x[:1],)).totals
    made = rotate_(net, x)
    report = describe(net, (x[:1],))
    rows = {row.name: row for row in report.rows if row.type == "Rotation"}
    wanted = {"conv": 4 * 8 * 36, "down": 16 * 16 * 36, "shortcut": 4 * 36 * 9, "tokens": 16 * 16 * 9}
    wanted["back"] = 4 * 12 * 9
    assert {name.removesuffix(".online.0"): row.macs for name, row in rows.items()} == wanted
    assert made.cost.macs == sum(wanted.values()) and made.cost.bytes == 0
    assert all(not row.covered and row.bops == 16 * row.macs for row in rows.values())
    assert rows["conv.online.0"].reason == "online rotation in blocks of 4"
    after = report.totals
    for scope in ("conv_linear", "everything"):
        assert after["macs"][scope] == before["macs"][scope] + made.cost.macs
        assert after["bops"][scope] == before["bops"][scope] + 16 * made.cost.macs
        assert after["bops_fp32"][scope] == before["bops_fp32"][scope]
    assert {row.type for row in report.rows} == {"Conv2d", "Linear", "Rotation"}
    assert after["params"] == before["params"]


def test_quantizers_see_turned_inputs_and_a_saved_network_is_the_same(net, x, tmp_path):
    net, x = net.float(), x.float()
    rules = Policy(attention=False, first=(), last=()).rules(Widths(4, 8))
    made = rotate_(net, x, rules=rules)
    report = quantize_(net, rules, (x[:1],))
    seen = []
    hook = net.tokens.input_quantizer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    taken = net.tokens.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    calibrate_(net, "minmax", [(x,)])
    hook.remove(), taken.remove()
    torch.testing.assert_close(seen[1], seen[0] @ net.tokens.online[0].matrix.float())
    checked = proven(net, report, (x,))
    assert {row.name for row in checked.rows if row.covered} == {
        "conv", "down", "depthwise", "shortcut", "narrow", "tokens", "back"
    }
    save_quantized(tmp_path, net, rules, report, {})
    fresh = Net().eval()
    applied_from_dict(made.to_dict()).install_(fresh)
    load_quantized_(fresh, tmp_path, (x[:1],))
    assert torch.equal(fresh(x), net(x))
    again = copy.deepcopy(net)
    assert torch.equal(again(x), net(x)) and len(list(online_parts(again))) == 5


@pytest.mark.parametrize(("entries", "said"), [
    ([{"name": "rotate", "group": 8}], "rotate: group=8: choose a power of 4"),
    ([{"name": "rotate", "group": 1}], "rotate: group=1: choose a power of 4"),
    ([{"name": "rotate", "group": "all"}], "rotate: group=all: choose a power of 4"),
    ([{"name": "rotate", "skip": "conv"}], "rotate: skip=conv: give a list"),
    (["rotate", "smooth"], "the order is smooth, rotate, low_rank"),
    (["rotate", "rotate"], "rotate is listed twice"),
])
def test_impossible_settings_are_refused(entries, said):
    with pytest.raises(ConfigError, match="^quantization.transforms: [^\n]*$") as error:
        transforms_of(entries)
    assert said in str(error.value)


@pytest.mark.parametrize("fold", [False, True])
def test_no_data_is_looked_at(net, x, fold):
    def never(network):
        raise AssertionError("calibration states are asked for")

    rotate = Rotate(fold=fold)
    assert not Rotate.uses_data and rotate.fit(net, rotate.find(net, (x[:1],)), Fitting(never)) == {}
