"""Small calibrated networks, one for each thing that an engine has to execute."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from ptq_exp.quantization import Policy, Widths, calibrate_, quantize_, segmented

PLAIN = {"first": ("first",), "last": ("last",)}


class Network(nn.Module):
    """Convolutions, a linear layer and attention between two layers of 16-bit inputs."""

    def __init__(self, attention: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1, stride=2)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.attention = Attention(16, heads=2, dim_head=8) if attention else None
        self.linear = nn.Linear(16, 24)
        self.sequence = nn.Conv1d(24, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 3, 1)

    def forward(self, x):
        h = nn.functional.silu(self.second(nn.functional.silu(self.first(x))))
        h = h + self.grouped(h)
        n, c, height, width = h.shape
        h = h.flatten(2).transpose(1, 2)
        if self.attention is not None:
            h = h + self.attention(h)
        h = self.sequence(nn.functional.gelu(self.linear(h)).transpose(1, 2))
        return self.last(h.reshape(n, c, height, width))


class Shortcut(nn.Module):
    """A convolution of two concatenated tensors of different ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.shortcut = nn.Conv2d(16, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        h = self.first(x)
        return self.last(self.shortcut(torch.cat((h, 20 * h.tanh()), 1)))


@pytest.fixture(scope="session")
def made():
    """Build and quantize a network: `made(cls, weight_bits, activation_bits, **settings)` -> (network, x)."""

    def build(kind=Network, weight_bits=8, activation_bits=8, bins=1, **settings):
        torch.manual_seed(0)
        network, x = kind().eval().requires_grad_(False), torch.randn(4, 3, 8, 8)
        rules = Policy(**PLAIN, **settings).rules(Widths(weight_bits, activation_bits), bins)
        quantize_(network, rules, (x[:1],))
        return network, x

    return build


@pytest.fixture(scope="session")
def calibrated(made):
    """`made`, with its ranges found: once for each network, of which the tests get copies."""
    found = {}

    def build(*args, **settings):
        key = args, tuple(sorted(settings.items()))
        if key not in found:
            found[key] = made(*args, **settings)
            calibrate_(found[key][0], "mse", [(found[key][1],)])
        network, x = found[key]
        return copy.deepcopy(network), x

    return build


@pytest.fixture(scope="session")
def split():
    """A calibrated network whose shortcut has a range for each of the two tensors that it reads."""
    torch.manual_seed(0)
    network, x = Shortcut().eval().requires_grad_(False), torch.randn(4, 3, 8, 8)
    quantize_(network, segmented(Policy(**PLAIN, attention=False).rules(Widths(8, 8)), {"shortcut": (8, 8)}), (x[:1],))
    calibrate_(network, "mse", [(x,)])
    return network, x
