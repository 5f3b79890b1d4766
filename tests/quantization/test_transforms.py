"""Transforms: exact in double precision, alone and in a row; saved and loaded; the report counts what they cost.

Beside those that are registered, one with parts at run time: inputs of linear layers turned by an orthogonal matrix.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ptq_exp.errors import ConfigError, DataError
from ptq_exp.quantization import (
    TRANSFORMS,
    Applied,
    Cost,
    Fitting,
    Policy,
    Transform,
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


@dataclass(frozen=True)
class Turned(Transform):
    """W x = (W Q) (Q^T x), with a Q from the QR decomposition of what the layer reads and noise."""

    name: ClassVar[str] = "turned"
    seed: int = 0

    def find(self, network, example_inputs):
        return {name: (name,) for name, layer in network.named_modules() if type(layer) is nn.Linear}

    def fit(self, network, sites, fitting):
        generator, seen = torch.Generator().manual_seed(self.seed), {}
        hooks = [
            network.get_submodule(name).register_forward_pre_hook(
                lambda layer, args, name=name: seen.update({name: args[0].detach().flatten(0, -2)})
            )
            for name in sites
        ]
        fitting.run(network)
        for hook in hooks:
            hook.remove()
        noise = {name: torch.randn(x.shape[1], x.shape[1], generator=generator) for name, x in seen.items()}
        return {name: torch.linalg.qr(noise[name].to(x) + x.T @ x / len(x)).Q for name, x in seen.items()}

    def install_(self, network, sites):
        for name in sites:
            layer = network.get_submodule(name)
            layer.turn = nn.Parameter(torch.eye(layer.in_features).to(layer.weight), requires_grad=False)
            layer.register_forward_pre_hook(lambda layer, args: (args[0] @ layer.turn, *args[1:]))

    def fold_(self, network, sites, tensors):
        for name in sites:
            layer = network.get_submodule(name)
            layer.turn.data = tensors[name].to(layer.weight)
            layer.weight.data = layer.weight @ layer.turn

    def cost(self, network, sites, layer_macs: Mapping[str, int]):
        layers = {name: network.get_submodule(name) for name in sites}
        macs = sum(layer_macs[name] * layer.in_features // layer.out_features for name, layer in layers.items())
        return Cost(macs, sum(4 * layer.in_features**2 for layer in layers.values()))


class Net(nn.Module):
    """x [N, 4, 3, 3]; norms and a layer directly before layers, an activation, a residual sum."""

    def __init__(self):
        super().__init__()
        self.norm, self.q, self.k = nn.GroupNorm(2, 4), nn.Linear(4, 6), nn.Linear(4, 6)
        self.up, self.down, self.conv = nn.Linear(6, 8), nn.Linear(8, 4), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        y = self.down(self.up(F.silu(self.q(tokens) * self.k(tokens))))
        return x + self.conv(y.transpose(1, 2).reshape(x.shape))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net().double().eval().requires_grad_(False)
    net.norm.weight.data = torch.tensor([0.1, 1.0, 10.0, 100.0], dtype=torch.float64)
    net.norm.bias.data.normal_()
    return net


@pytest.fixture
def x():
    return torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(autouse=True)
def turned_is_registered(monkeypatch):
    monkeypatch.setitem(TRANSFORMS, "turned", Turned)


RULES = Policy(attention=False, first=(), last=()).rules(Widths(4, 4))
SMALL = {"name": "low_rank", "rank": 1, "conv3x3": True}
CHAINS = [[SMALL if name == "low_rank" else name] for name in (*TRANSFORMS, "turned")] + [
    ["smooth", "turned"], ["smooth", "rotate"], ["rotate", SMALL], ["smooth", "rotate", SMALL],
    [{"name": "smooth", "alpha": 0.9}, {"name": "turned", "seed": 3}]
]


def transformed(network, entries, x) -> list[Applied]:
    """Apply the transforms to `network`, one after the other."""
    done = []
    for transform in transforms_of(entries):
        sites = transform.find(network, (x[:1],))
        assert sites, "the network has no place for it"
        tensors = transform.fit(network, sites, Fitting(lambda network: network(x), RULES))
        done.append(applied_to(network, (x[:1],), Applied(transform, sites, tensors)))
    return done


@pytest.mark.parametrize("entries", CHAINS, ids=str)
def test_the_function_stays_and_the_weights_change(net, x, entries):
    before = copy.deepcopy(net)
    for made in transformed(net, entries, x):
        for layers in made.sites.values():
            assert all(
                not torch.equal(net.get_submodule(n).weight, before.get_submodule(n).weight) for n in layers
            )
    torch.testing.assert_close(net(x), before(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("entries", CHAINS, ids=str)
def test_what_was_fitted_survives_a_file_and_makes_the_same_network_again(net, x, entries, tmp_path):
    again, loaded = copy.deepcopy(net), Net().double().eval().requires_grad_(False)
    for n, made in enumerate(transformed(net, entries, x)):
        np.savez(tmp_path / f"{n}.npz", **{name: tensor.numpy() for name, tensor in made.tensors.items()})
        record = applied_from_dict(json.loads(json.dumps(made.to_dict())))
        assert (record.transform, record.sites, record.cost) == (made.transform, made.sites, made.cost)
        tensors = {name: torch.from_numpy(array) for name, array in np.load(tmp_path / f"{n}.npz").items()}
        Applied(record.transform, record.sites, tensors).apply_(again)
        record.install_(loaded)
    loaded.load_state_dict(net.state_dict(), strict=True)
    for network in (again, loaded):
        assert torch.equal(network(x), net(x))


@pytest.mark.parametrize("entries", CHAINS, ids=str)
def test_the_report_counts_what_a_transform_costs(net, x, entries):
    before = describe(net, (x[:1],)).totals
    cost = [made.cost for made in transformed(net, entries, x)]
    after = describe(net, (x[:1],)).totals
    assert after["macs"]["everything"] - before["macs"]["everything"] == sum(c.macs for c in cost)
    assert after["weight_bytes"] - before["weight_bytes"] == sum(c.bytes for c in cost)
    assert (sum(c.macs for c in cost) > 0) == (entries != ["smooth"])


def test_a_quantized_network_with_parts_at_run_time_is_saved_and_loaded(net, x, tmp_path):
    net, x = net.float(), x.float()
    done = transformed(net, ["smooth", "turned"], x)
    rules = Policy(attention=False, first=(), last=()).rules(Widths(4, 8))
    report = quantize_(net, rules, (x[:1],))
    calibrate_(net, "minmax", [(x,)])
    save_quantized(tmp_path, net, rules, report, {"transforms": [made.to_dict() for made in done]})
    torch.manual_seed(5)
    fresh = Net().eval()
    for record in json.loads((tmp_path / "quantization.json").read_text())["transforms"]:
        applied_from_dict(record).install_(fresh)
    load_quantized_(fresh, tmp_path, (x[:1],))
    assert torch.equal(fresh(x), net(x))


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("smoth", "smoth: choose one of smooth, rotate, low_rank, turned"),
        ({"name": "smooth", "beta": 1}, "smooth has no setting beta; it has alpha"),
        ({"name": "smooth", "alpha": 2}, "smooth: alpha=2: choose 0..1"),
        ({"name": "smooth", "alpha": "much"}, "smooth: alpha=much: choose 0..1"),
        ({"alpha": 0.5}, "is no transform"), (3, "3 is no transform"), (["smooth"], "is no transform"),
    ],
)
def test_impossible_transforms_are_refused_in_one_line(entry, said):
    with pytest.raises(ConfigError, match="^quantization.transforms: [^\n]*$") as error:
        transforms_of([entry])
    assert said in str(error.value)


@pytest.mark.parametrize("record", [
    {}, {"name": "smooth"}, {"name": "gone", "sites": {}, "macs": 0, "bytes": 0}, [],
    {"name": "smooth", "sites": ["a"], "macs": 0, "bytes": 0},
    {"name": "smooth", "sites": {"a": 1}, "macs": 0, "bytes": 0},
])
def test_damaged_records_are_refused(record):
    with pytest.raises(DataError, match="the record of a transform is damaged"):
        applied_from_dict(record)


def test_transforms_with_equal_settings_are_equal_and_settings_have_defaults():
    assert transforms_of(["smooth"]) == transforms_of([{"name": "smooth", "alpha": 0.5}])
    assert transforms_of(["smooth"])[0].to_dict() == {"name": "smooth", "alpha": 0.5}
