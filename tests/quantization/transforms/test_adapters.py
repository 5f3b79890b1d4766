"""LoRA adapters of peft on layers with online parts: they read what the layer is called with."""

import copy

import pytest
import torch
from torch import nn

from ptq_exp.quantization import (
    Applied,
    Fitting,
    Policy,
    QuantLinear,
    Widths,
    applied_to,
    calibrate_,
    quantize_,
    transforms_of,
)

peft = pytest.importorskip("peft")
ENTRIES = [{"name": "smooth", "online": True}, "rotate", {"name": "low_rank", "rank": 2, "conv3x3": True}]


class Net(nn.Module):
    """x [N, 8, 4, 4]: a convolution and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(8, 16, 3, padding=1), nn.Linear(16, 16)

    def forward(self, x):
        return self.linear(torch.tanh(self.conv(x)).flatten(2).transpose(1, 2))


def test_adapters_of_zeros_change_no_bit_and_others_add_what_they_make_of_the_layers_own_input():
    torch.manual_seed(0)
    net, x = Net().eval().requires_grad_(False), torch.randn(3, 8, 4, 4)
    rules = Policy(attention=False, first=(), last=()).rules(Widths(4, 8))
    for transform in transforms_of(ENTRIES):
        sites = transform.chosen(transform.find(net, (x[:1],)), rules)
        tensors = transform.fit(net, sites, Fitting(lambda network: network(x), rules))
        applied_to(net, (x[:1],), Applied(transform, sites, tensors))
    quantize_(net, rules, (x[:1],))
    calibrate_(net, "minmax", [(x,)])
    plain, before = copy.deepcopy(net), net(x)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["conv", "linear"])
    peft.inject_adapter_in_model(config, net)
    assert torch.equal(net(x), before)
    assert type(net.conv.lora_A["default"]) is nn.Conv2d and isinstance(net.linear.base_layer, QuantLinear)
    for layer, shape in ((net.conv, x.shape), (net.linear, (3, 16, 16))):
        layer.lora_B["default"].weight.data.normal_()
        read = torch.randn(shape)
        own = plain.conv(read) if layer is net.conv else plain.linear(read)
        torch.testing.assert_close(layer(read), own + layer.lora_B["default"](layer.lora_A["default"](read)))
