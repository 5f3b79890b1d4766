"""What transforms compute at run time is executed, before and beside 8-bit layers, and said as it is."""

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from ptq_exp.quantization import Applied, Fitting, Policy, Widths, applied_to, calibrate_, quantize_, transforms_of
from ptq_exp.runtime import runtime_of


class Network(nn.Module):
    """A strided convolution, attention and a linear layer between two layers of 16-bit inputs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, stride=2)
        self.attention, self.linear = Attention(16, heads=2, dim_head=8), nn.Linear(16, 16)
        self.last = nn.Conv2d(16, 3, 1)

    def forward(self, x):
        h = nn.functional.silu(self.second(nn.functional.silu(self.first(x))))
        tokens = h.flatten(2).transpose(1, 2)
        tokens = nn.functional.gelu(self.linear(tokens + self.attention(tokens)))
        return self.last(tokens.transpose(1, 2).reshape(h.shape))


ENTRIES = ["rotate", {"name": "low_rank", "rank": 2, "conv3x3": True}]


@pytest.fixture(scope="module")
def network_and_x():
    torch.manual_seed(0)
    network, x = Network().eval().requires_grad_(False), torch.randn(4, 3, 8, 8)
    rules = Policy(first=("first",), last=("last",)).rules(Widths(8, 8))
    for transform in transforms_of(ENTRIES):
        sites = transform.chosen(transform.find(network, (x[:1],)), rules)
        tensors = transform.fit(network, sites, Fitting(lambda network: network(x), rules))
        applied_to(network, (x[:1],), Applied(transform, sites, tensors))
    quantize_(network, rules, (x[:1],))
    calibrate_(network, "minmax", [(x,)])
    return network, x


def error(found, wanted) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", ["torch", "openvino"])
def test_engines_compute_online_parts_in_float_and_the_layers_behind_them_as_integers(network_and_x, name):
    network, x = network_and_x
    runtime = runtime_of(name, {"threads": 1} if name == "openvino" else {})
    made = runtime.compile(network, (x[:1],))
    assert error(made(x), network(x)) < 0.03  # ties that fall to the other side
    rows = {row.layer: row for row in runtime.account()}
    assert rows["linear"].executed == rows["second"].executed == "int8"
    assert rows["second.online.0"].executed == rows["second.branch"].executed == "float"
    assert rows["second.online.0"].reason == "online rotation in blocks of 16"


def test_without_the_branch_the_answer_is_another(network_and_x):
    network, x = network_and_x
    made, wanted = runtime_of("torch", {}).compile(network, (x[:1],)), network(x)
    near = error(made(x), wanted)
    for module in made.modules():
        if getattr(module, "branch", None) is not None:
            module.branch = None
    assert error(made(x), wanted) > 5 * near
