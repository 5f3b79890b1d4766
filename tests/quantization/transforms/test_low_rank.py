"""The low-rank branch: an unchanged function, a smaller error, what shares a factor, what it reads, what it costs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn

from ptq_exp.errors import ConfigError
from ptq_exp.quantization import (
    Applied,
    Fitting,
    PerGroup,
    Policy,
    QuantSpec,
    Rule,
    TensorSpec,
    Widths,
    applied_from_dict,
    applied_to,
    calibrate_,
    describe,
    disabled,
    load_quantized_,
    proven,
    quantize_,
    save_quantized,
    transforms_of,
)
from ptq_exp.quantization.transforms.inputs import Rows, matrix_of, unfolded
from ptq_exp.quantization.transforms.low_rank import LowRankBranch
from ptq_exp.quantization.transforms.rotate import Rotate

RULES = Policy(attention=False, first=(), last=()).rules(Widths(4, 8))


class Net(nn.Module):
    """x [N, 16, 4, 4]: attention on x and on a context of it, a feed-forward layer, convolutions."""

    def __init__(self):
        super().__init__()
        self.own, self.cross = (Attention(16, heads=2, dim_head=8) for _ in range(2))
        self.context, self.time = nn.Linear(16, 16), nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.point, self.conv = nn.Conv2d(16, 24, 1, stride=2), nn.Conv2d(24, 16, 3, padding=1)

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        context = self.context(tokens)
        y = tokens + self.own(tokens) + self.cross(tokens, context)
        y = self.time[1](F.silu(self.time[0](F.silu(y))))
        return self.conv(F.silu(self.point(y.transpose(1, 2).reshape(x.shape))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net().double().eval().requires_grad_(False)
    for layer in net.modules():  # a few large rows: what a branch is for
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.weight.data[:2] *= 8
    return net


@pytest.fixture
def x():
    return torch.randn(6, 16, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def branched_(network, x, rules=RULES, **settings):
    transform = LowRankBranch(**{"rank": 2, **settings})
    sites = transform.chosen(transform.find(network, (x[:1],)), rules)
    tensors = transform.fit(network, sites, Fitting(lambda network: network(x), rules))
    return applied_to(network, (x[:1],), Applied(transform, sites, tensors))


def test_siblings_that_read_one_tensor_share_a_factor(net, x):
    made = branched_(net, x)
    assert made.sites == {
        "own.to_q": ("own.to_q", "own.to_k", "own.to_v"), "own.to_out.0": ("own.to_out.0",),
        "cross.to_q": ("cross.to_q",), "cross.to_k": ("cross.to_k", "cross.to_v"),
        "cross.to_out.0": ("cross.to_out.0",),
        "context": ("context",), "time.0": ("time.0",), "time.1": ("time.1",), "point": ("point",),
    }
    state = net.state_dict()
    assert "own.to_q.branch.down" in state and "own.to_k.branch.down" not in state and "own.to_k.branch.up" in state
    assert net.own.to_v.branch.first is net.own.to_q.branch.down
    assert {value.dtype for name, value in state.items() if ".branch." in name} == {torch.float16}
    assert "conv" in branched_(Net().double().eval().requires_grad_(False), x, conv3x3=True).sites


@pytest.mark.parametrize("settings", [{}, {"conv3x3": True}, {"rank": 5, "iterations": 1}], ids=str)
def test_the_function_stays_whatever_the_branch_rounds_to(net, x, settings):
    before = copy.deepcopy(net)
    made = branched_(net, x, **settings)
    torch.testing.assert_close(net(x), before(x), rtol=0, atol=1e-12 * float(before(x).abs().max()) * 10)
    for layers in made.sites.values():
        for name in layers:
            layer = net.get_submodule(name)
            assert torch.linalg.matrix_rank(layer.branch.weight_of_product.flatten(1)) == made.transform.rank
            torch.testing.assert_close(
                layer.weight + layer.branch.weight_of_product, before.get_submodule(name).weight, rtol=0, atol=1e-12
            )


def test_quantized_with_a_branch_is_nearer_and_more_rank_is_nearer_still(net, x):
    wanted, errors = net(x), []
    for rank in (0, 2, 6):
        network = copy.deepcopy(net).float()
        if rank:
            branched_(network, x.float(), rank=rank, conv3x3=True)
        quantize_(network, RULES, (x[:1].float(),))
        calibrate_(network, "minmax", [(x.float(),)])
        errors.append(float((network(x.float()) - wanted).norm() / wanted.norm()))
    assert errors[2] < errors[1] < 0.8 * errors[0]


def test_the_branch_reads_the_turned_input_before_it_is_quantized(net, x):
    net, x = net.float(), x.float()
    applied_to(net, (x[:1],), Applied(Rotate(), Rotate().find(net, (x[:1],))))
    branched_(net, x)
    quantize_(net, RULES, (x[:1],))
    calibrate_(net, "minmax", [(x,)])
    layer, seen = net.point, {}
    layer.branch.register_forward_pre_hook(lambda _, args: seen.update(branch=args[0]))
    layer.register_forward_pre_hook(lambda _, args: seen.update(layer=args[0]))
    y = layer(torch.randn(2, 16, 4, 4))
    assert torch.equal(seen["branch"], layer.online(seen["layer"]))
    own = F.conv2d(layer.input_quantizer(seen["branch"]), layer.weight, layer.bias, stride=2)
    assert torch.equal(y, own + layer.branch(seen["branch"]))


def test_operands_of_attention_are_quantized_with_the_branch_inside(net, x):
    net, x = net.float(), x.float()
    rules = Policy(first=(), last=()).rules(Widths(4, 8))
    branched_(net, x, rules=rules)
    report = quantize_(net, rules, (x[:1],))
    calibrate_(net, "minmax", [(x,)])
    checked = proven(net, report, (x,))
    uncovered = {row.name for row in checked.rows if not row.covered}
    assert uncovered and all(name.endswith(".branch") for name in uncovered)
    assert net.own.to_q.output_quantizer.off_grid(net.own.to_q(torch.randn(2, 5, 16))) == 0


def test_report_and_cost_count_both_factors_at_16_bits(net, x):
    before = describe(net, (x[:1],)).totals
    made = branched_(net, x, skip=["cross*", "time*", "context"])
    report = describe(net, (x[:1],))
    rows = {row.name: row for row in report.rows if row.type == "Branch"}
    # rank * (in + out) for each of 16 tokens, or 4 positions; the shared factor is computed by each layer, stored once
    linear, point = 16 * 2 * (16 + 16), 4 * 2 * (16 + 24)
    assert {name: row.macs for name, row in rows.items()} == {
        **{f"own.{name}.branch": linear for name in ("to_q", "to_k", "to_v", "to_out.0")}, "point.branch": point,
    }
    assert made.cost.macs == 4 * linear + point
    assert made.cost.bytes == 2 * (2 * (16 + 3 * 16) + 2 * (16 + 16) + 2 * (16 + 24))
    after = report.totals
    assert after["bops"]["conv_linear"] - before["bops"]["conv_linear"] == 256 * made.cost.macs
    assert after["weight_bytes"] - before["weight_bytes"] == made.cost.bytes
    assert (after["params"], after["fp32_bytes"]) == (before["params"], before["fp32_bytes"])
    assert all(not row.covered and row.reason == "low-rank branch of rank 2" for row in rows.values())


def test_a_branch_as_large_as_the_layer_is_left_out_and_said(net, x):
    transform = LowRankBranch(rank=9)
    assert "own.to_out.0" not in transform.find(net, (x[:1],)) and "own.to_q" in transform.find(net, (x[:1],))
    assert transform.left(net, (x[:1],))["time.0"] == (
        "no branch: with rank 9 it would be as large as the weight of 16 x 16"
    )


def test_saved_and_loaded_bit_for_bit_and_all_quantizers_off_is_the_same_function(net, x, tmp_path):
    net, x = net.float(), x.float()
    made = branched_(net, x, conv3x3=True)
    before = net(x)
    report = quantize_(net, RULES, (x[:1],))
    with disabled(net):
        assert torch.equal(net(x), before)
    calibrate_(net, "minmax", [(x,)])
    saved = save_quantized(tmp_path, net, RULES, report, {})
    assert saved["totals"]["weight_bytes"] == report.totals["weight_bytes"]
    fresh = Net().eval().requires_grad_(False)
    applied_from_dict(made.to_dict()).install_(fresh)
    load_quantized_(fresh, tmp_path, (x[:1],))
    assert torch.equal(fresh(x), net(x)) and torch.equal(copy.deepcopy(fresh)(x), net(x))


def test_weight_groups_and_mixed_rules_are_those_of_the_layer(net, x):
    grouped = QuantSpec(TensorSpec(4, True, PerGroup(4)), TensorSpec(8))
    rules = [Rule("time.0", None, "kept"), Rule("time.1", QuantSpec(None, TensorSpec(8))), Rule("*", grouped)]
    sites = branched_(net, x, rules=rules).sites
    assert "time.0" not in sites and "time.1" not in sites and "context" in sites


@pytest.mark.parametrize("layer", [
    nn.Linear(6, 4), nn.Conv2d(6, 4, 1, stride=2), nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(6, 4, (3, 2), stride=2),
    nn.Conv1d(6, 4, 3, padding=2, dilation=2), nn.Conv1d(6, 4, 1),
], ids=str)
def test_unfolded_inputs_times_the_matrix_is_the_layer(layer):
    shape = {2: (5, 7, 6), 3: (5, 6, 9), 4: (5, 6, 9, 8)}[layer.weight.ndim]
    layer, x = layer.double(), torch.randn(shape, dtype=torch.float64)
    y = layer(x) - layer.bias.view(-1, *[1] * (layer.weight.ndim - 2))
    rows = y.flatten(0, 1) if isinstance(layer, nn.Linear) else y.flatten(2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(unfolded(layer, x) @ matrix_of(layer).T, rows)


@pytest.mark.parametrize("sizes", [[3, 5], [7], [100], [5] * 30, [1] * 77, [64, 1, 64, 3]])
def test_rows_are_evenly_spread_over_all_that_were_shown(sizes):
    rows, shown = Rows(8), torch.arange(sum(sizes)).float().unsqueeze(1)
    for part in shown.split(sizes):
        rows.show(part)
    kept = rows.kept.flatten().int().tolist()
    stride = kept[1] - kept[0]
    assert kept == list(range(0, sum(sizes), stride)) and (len(kept) >= 8 or stride == 1) and len(kept) < 16


@pytest.mark.parametrize(("setting", "said"), [
    ({"rank": 0}, "rank=0: choose 1 or more"), ({"iterations": 1.5}, "iterations=1.5: choose 1 or more"),
    ({"patience": True}, "patience=True: choose 1"), ({"conv3x3": "yes"}, "conv3x3=yes: choose true or false"),
    ({"skip": [1]}, "skip=[1]: give a list of globs"), ({"ranks": 3}, "low_rank has no setting ranks"),
])
def test_impossible_settings_are_refused(setting, said):
    with pytest.raises(ConfigError, match="^quantization.transforms: [^\n]*$") as error:
        transforms_of([{"name": "low_rank", **setting}])
    assert said in str(error.value)
