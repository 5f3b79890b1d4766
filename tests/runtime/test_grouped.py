"""Linear layers whose 4-bit weights have a scale per group: what OpenVINO multiplies, stores and says of them."""


from functools import cache

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from ptq_exp.errors import ConfigError
from ptq_exp.quantization import Policy, Widths, calibrate_, quantize_
from ptq_exp.runtime import runtime_of
from ptq_exp.runtime.deployable import deployable
from ptq_exp.runtime.grouped import group_settings, grouped_weight
from ptq_exp.runtime.plan import integer_plan

pytest.importorskip("openvino")


class Tokens(nn.Module):
    """A transformer block of 64 channels between two layers of 16-bit inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 64)
        self.attention = Attention(64, heads=2, dim_head=32)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)
        self.last = nn.Linear(64, 8)

    def forward(self, x):
        h = self.first(x)
        h = h + self.attention(h)
        return self.last(h + self.down(nn.functional.gelu(self.up(h))))


@cache
def calibrated(group_size: int = 32, bits: int = 4, **policy) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    network, x = Tokens().eval().requires_grad_(False), torch.randn(4, 16, 8)
    settings = {"weight_granularity": "group", "group_size": group_size, "qkv_symmetric": True} | policy
    quantize_(network, Policy(first=("first",), last=("last",), **settings).rules(Widths(bits, 8)), (x[:1],))
    calibrate_(network, "mse", [(x,)])
    return network, x


def compiled(network, x):
    """The runtime and what it makes of `network`, without the process that would compile it first."""
    runtime = runtime_of("openvino", {"weights": "groups", "threads": 1})
    made = runtime.compile(network, (x[:1],))
    made._try_first = False
    return runtime, made


@torch.no_grad()
def error(found, wanted) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("policy", [{}, {"weight_symmetric": True}, {"group_size": 64, "bits": 3}])
def test_the_weight_in_groups_is_that_of_the_simulation(policy):
    network, _ = calibrated(**policy)
    for layer in (network.up, network.attention.to_q, network.down):
        found = grouped_weight(layer)
        values = (found.levels.float() - found.zero.float()) * found.scale
        assert found.levels.max() < 16 and found.size == policy.get("group_size", 32)
        assert torch.equal(values.flatten(1), layer.weight_quantizer(layer.weight))


@pytest.mark.parametrize("policy", [{"group_size": 16}, {"bits": 8}, {"weight_granularity": "channel"}])
def test_what_the_engine_gains_nothing_by_is_not_planned_in_groups(policy):
    network, _ = calibrated(**policy)
    assert grouped_weight(network.up) is None


def test_openvino_executes_groups_with_inputs_that_it_quantizes():
    network, x = calibrated()
    runtime, made = compiled(network, x)
    plain = deployable(network, integer_plan(network, groups=True))
    assert 1e-4 < error(made(x), plain(x)) < 0.02  # the engine's rounding of inputs, and no more
    assert error(made(x), network(x)) < 0.02
    rows = {row.layer: row for row in runtime.account()}
    for name in ("up", "down", "attention.to_q", "attention.to_out.0"):
        assert rows[name].executed == "int8" and rows[name].kernel.startswith("brgemm")
        assert rows[name].reason == "4-bit groups of 32, the engine quantizes the input"
    assert rows["first"].executed == rows["last"].executed == "float"
    assert rows["attention.qk"].executed == rows["attention.av"].executed == "int8"
    path, _ = made.files((x,))
    weights = sum(layer.weight.numel() for layer in (network.up, network.down, *_projections(network)))
    scales = weights // 32
    others = sum(layer.weight.numel() for layer in (network.first, network.last))
    assert path.with_suffix(".bin").stat().st_size < weights / 2 + 4.5 * scales + 4 * others + 6000


def _projections(network):
    attention = network.attention
    return attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]


def test_without_the_engines_own_quantization_the_weights_are_exact():
    """What differs from the plain network is the rounding of inputs alone."""
    network, x = calibrated()
    _, made = compiled(network, x)
    assert made._settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == 32
    made._settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
    plain = deployable(network, integer_plan(network, groups=True))
    assert group_settings(plain) == {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 32} and group_settings(network) == {}
    assert error(made(x), plain(x)) < 5e-5


def test_where_the_engine_leaves_inputs_in_float_the_account_says_so(monkeypatch):
    network, x = calibrated()
    monkeypatch.setattr("ptq_exp.runtime.probe.quantizes_inputs", lambda make, size: False)
    runtime, _ = compiled(network, x)
    rows = {row.layer: row for row in runtime.account()}
    assert rows["up"].executed == "float" and "leaves the input in float" in rows["up"].reason


@pytest.mark.parametrize("options", [{}, {"weights": "7bit"}])
def test_groups_are_refused_by_what_can_be_set(options):
    network, x = calibrated()
    message = (
        r"^runtime=openvino: attention.to_q has a scale for every 32 input channels, which it cannot run: choose "
        r"quantization.weight_granularity=channel, runtime.weights=groups \(with quantization.group_size=32 or more\), "
        r"or runtime.regrid=true$"
    )
    with pytest.raises(ConfigError, match=message):
        runtime_of("openvino", options).compile(network, (x[:1],))


def test_groups_of_sixteen_are_refused_even_so_and_other_engines_have_no_such_weights():
    network, x = calibrated(group_size=16)
    with pytest.raises(ConfigError, match="a scale for every 16 input channels.*group_size=32 or more"):
        runtime_of("openvino", {"weights": "groups"}).compile(network, (x[:1],))
    with pytest.raises(ConfigError, match="runtime.weights=groups: choose one of as_saved, 7bit"):
        runtime_of("torch", {"weights": "groups"})
