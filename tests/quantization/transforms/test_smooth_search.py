"""Smoothing by search, online and by powers of two: numbers of the references, an unchanged function, what it costs."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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
    quantize_,
    save_quantized,
    transforms_of,
)
from ptq_exp.quantization.transforms.low_rank_split import truncated
from ptq_exp.quantization.transforms.powers import elected, votes
from ptq_exp.quantization.transforms.rounding import input_rounding, weight_rounding
from ptq_exp.quantization.transforms.smooth import Smooth, smoothing_factors
from ptq_exp.quantization.transforms.smooth_search import best_factors, exponents, factors_of

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "kit" / "smooth.npz")
RULES = Policy(attention=False, first=(), last=()).rules(Widths(4, 4))


def golden(key):
    return torch.from_numpy(GOLDEN[key]).double()


def rounded(x):
    """4 bits, symmetric, a scale for each 64 channels of a row."""
    blocks = x.unflatten(-1, (-1, 64))
    scale = blocks.abs().amax(-1, keepdim=True) / 7
    return ((blocks / torch.where(scale == 0, 1.0, scale)).round().clamp(-7, 7) * scale).flatten(-2)


@pytest.mark.parametrize("kind", ["plain", "lowrank8"])
@pytest.mark.parametrize("case", ["grid_a", "grid_b"])
def test_the_grid_of_the_reference(case, kind):
    w, x, errors = golden(f"{case}/w"), golden(f"{case}/x"), []

    def error(factors):
        weight, inputs = w * factors, x / factors
        up, down = truncated(weight, 8)
        branch = up @ down if kind == "lowrank8" else 0 * weight
        answer = inputs @ branch.T + rounded(inputs) @ rounded(weight - branch).T
        errors.append(float((x @ w.T - answer).square().sum()))
        return errors[-1]

    assert torch.equal(torch.tensor(list(exponents())), golden(f"{case}/{kind}/alpha_beta").float())
    best = best_factors(x.abs().amax(0), w.abs().amax(0), error)
    np.testing.assert_allclose(errors, GOLDEN[f"{case}/{kind}/errors"], rtol=1e-6)
    torch.testing.assert_close(best, golden(f"{case}/{kind}/best_scale"), rtol=1e-9, atol=0)


def test_of_equal_errors_the_last_is_taken_and_what_is_not_finite_counts_as_none():
    x, w = torch.tensor([4.0, 1.0]), torch.tensor([1.0, 2.0])
    assert torch.equal(best_factors(x, w, lambda _: 1.0), factors_of(x, w, 0.95, 1 - 0.95))
    assert torch.equal(best_factors(x, w, lambda _: float("nan")), torch.ones(2).double())
    assert torch.equal(factors_of(x, torch.tensor([0.0, 1.0]), 0.5, 0.5), torch.ones(2).double())
    assert torch.equal(factors_of(torch.tensor([0.0, 4.0]), w, 0.5, 0.0), torch.tensor([1.0, 2.0]).double())
    assert torch.equal(factors_of(torch.tensor([float("inf"), 4.0]), w, 0.5, 0.0), torch.ones(2).double())


@pytest.mark.parametrize("alpha", ["0.0", "0.25", "0.5", "0.75", "0.8", "1.0"])
def test_factors_of_a_fixed_strength_as_in_the_reference(alpha):
    layers, x = nn.ModuleList(nn.Linear(64, 48, bias=False) for _ in range(3)).double(), golden("sq/act_absmax")
    for layer, w in zip(layers, golden("sq/w"), strict=True):
        layer.weight.data = w
    found = smoothing_factors(layers, {"norm": ("0", "1", "2")}, {"norm": x}, float(alpha))["norm"]
    w = golden("sq/w").abs().amax((0, 1))
    dead, live = (x == 0) | (w == 0), (x > 1e-5) & (w > 1e-5)  # between them the reference has floors
    assert live.sum() > 50 and dead.any() and torch.equal(found[dead], torch.ones_like(found[dead]))
    wanted = golden(f"sq/scale_alpha{alpha}")
    torch.testing.assert_close(found[live].double(), wanted[live], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_powers_of_two_as_in_the_reference(bits):
    x = golden(f"dmq/b{bits}/x")
    ends = (end.expand(x.shape[1]) for end in (x.amin(), x.amax()))
    counts = votes(x, *ends, bits, False)
    np.testing.assert_allclose(counts.amax(1) / len(x), GOLDEN[f"dmq/b{bits}/vote_ratio"], rtol=1e-6)
    assert torch.equal(1 / elected(counts), golden(f"dmq/b{bits}/mask"))
    assert (elected(counts) > 1).any()


class Net(nn.Module):
    """x [N, 8, 6, 6]: a norm before two layers, an activation before others, a concatenation of unequal parts."""

    def __init__(self):
        super().__init__()
        self.norm, self.q, self.k = nn.GroupNorm(2, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.conv, self.shortcut = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 6, 1)

    def forward(self, x):
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        y = F.silu(self.q(tokens) * self.k(tokens)).transpose(1, 2).reshape(x.shape)
        y = self.conv(y)
        return self.shortcut(torch.cat([y, 40 * F.silu(x)], 1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net().double().eval().requires_grad_(False)
    net.norm.weight.data = torch.logspace(-1, 1, 8).double()
    return net


@pytest.fixture
def x():
    return torch.randn(6, 8, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def smooth_(network, x, rules=RULES, **settings):
    transform = transforms_of([{"name": "smooth", **settings}])[0]
    sites = transform.chosen(transform.find(network, (x[:1],)), rules)
    tensors = transform.fit(network, sites, Fitting(lambda network: network(x), rules))
    return applied_to(network, (x[:1],), Applied(transform, sites, tensors))


EVERYTHING = {"alpha": "search", "online": True, "power_of_two": True}


@pytest.mark.parametrize("settings", [
    {"alpha": "search"}, {"alpha": "search", "rank": 2}, {"online": True}, {"power_of_two": True}, EVERYTHING
], ids=str)
def test_the_function_stays(net, x, settings):
    before = copy.deepcopy(net)
    made = smooth_(net, x, **settings)
    torch.testing.assert_close(net(x), before(x), rtol=1e-9, atol=1e-9)
    wanted = {"norm": ("q", "k")}
    wanted |= {"concat shortcut": ("shortcut",)} if settings.get("power_of_two") else {}
    wanted |= {"online conv": ("conv",)} if settings.get("online") else {}
    wanted |= {"online shortcut": ("shortcut",)} if settings == {"online": True} else {}
    assert made.sites == wanted
    assert not torch.equal(net.q.weight, before.q.weight)


def test_the_search_finds_less_output_error_of_the_readers_than_no_smoothing(net, x):
    errors, spec = {}, RULES[0].spec
    for alpha in ("search", None):
        network = copy.deepcopy(net)
        if alpha:
            smooth_(network, x, alpha=alpha)
        tokens = network.norm(x).flatten(2).transpose(1, 2).flatten(0, 1)
        errors[alpha] = 0.0
        for layer in (network.q, network.k):
            read = input_rounding(layer, spec, tokens)(tokens)
            answer = read @ weight_rounding(layer, spec)(layer.weight).T
            errors[alpha] += float((answer - tokens @ layer.weight.T).square().sum())
    assert errors["search"] < 0.7 * errors[None]


def test_powers_belong_to_the_small_part_of_the_concatenation(net, x):
    made = smooth_(net, x, power_of_two=True)
    factors = made.tensors["concat shortcut"]
    assert set(factors[:8].tolist()) <= {1.0, 0.5, 0.25, 0.125} and factors[:8].min() == 0.125
    assert torch.equal(factors[8:], torch.ones(8).double())
    assert torch.equal(net.shortcut.online[0].factor.double(), 1 / factors)


def test_what_is_online_is_counted_and_saved(net, x, tmp_path):
    net, x = net.float(), x.float()
    before = describe(net, (x[:1],)).totals
    made = smooth_(net, x, **EVERYTHING)
    after = describe(net, (x[:1],)).totals
    assert (made.cost.macs, made.cost.bytes) == ((8 + 16) * 36, 4 * (8 + 16))
    assert after["macs"]["everything"] - before["macs"]["everything"] == made.cost.macs
    assert after["bops"]["everything"] - before["bops"]["everything"] == 256 * made.cost.macs
    assert after["weight_bytes"] - before["weight_bytes"] == made.cost.bytes
    report = quantize_(net, RULES, (x[:1],))
    calibrate_(net, "minmax", [(x,)])
    save_quantized(tmp_path, net, RULES, report, {})
    fresh = Net().eval()
    applied_from_dict(made.to_dict()).install_(fresh)
    load_quantized_(fresh, tmp_path, (x[:1],))
    assert torch.equal(fresh(x), net(x))


def test_layers_in_full_precision_are_not_smoothed_online_and_do_not_decide(net, x):
    rules = [Rule("*", None, "all kept")]
    made = smooth_(net, x, rules, **EVERYTHING)
    assert made.sites == {"norm": ("q", "k")} and torch.equal(made.tensors["norm"], torch.ones(8).double())


def test_records_of_before_and_keys_of_runs_stay_what_they_were():
    assert Smooth().to_dict() == {"name": "smooth", "alpha": 0.5} and not Smooth().uses_rules
    assert Smooth(online=True).to_dict() == {"name": "smooth", "alpha": 0.5, "online": True}
    assert Smooth("search").uses_rules and Smooth(power_of_two=True).uses_rules


@pytest.mark.parametrize(("setting", "said"), [
    ({"alpha": "best"}, "alpha=best: choose 0..1, or search"), ({"alpha": True}, "alpha=True: choose 0..1"),
    ({"online": 1}, "online=1: choose true or false"), ({"rank": -1}, "rank=-1: choose 0 or more"),
    ({"rank": 8}, "rank=8: it is part of the search"),
])
def test_impossible_settings_are_refused(setting, said):
    with pytest.raises(ConfigError, match="^quantization.transforms: [^\n]*$") as error:
        transforms_of([{"name": "smooth", **setting}])
    assert said in str(error.value)
