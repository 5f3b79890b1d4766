"""Smoothing keeps the function, finds what it may touch, and evens the channels out."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ptq_exp.diffusion.zoo.registry import load_model
from ptq_exp.quantization.transforms.smooth import largest_outputs, smooth_, smoothable, smoothing_factors


class Net(nn.Module):
    """x [N, 4, 3, 3]."""

    def __init__(self):
        super().__init__()
        self.norm, self.q, self.k = nn.GroupNorm(2, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.layer_norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)
        self.active_norm, self.conv = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding=1)
        self.shared, self.one = nn.LayerNorm(4), nn.Linear(4, 4)
        self.plain, self.two = nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 4)
        self.image_norm, self.head = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1)
        self.turned, self.wrong = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x):
        tokens = self.norm(x).view(len(x), 4, 9).transpose(1, 2)
        y = self.q(tokens) + self.k(tokens)
        y = y + self.down(self.up(self.layer_norm(y)))  # `up` feeds `down` directly: a layer may be rescaled as well
        z = self.conv(F.silu(self.active_norm(x))) + self.head(self.image_norm(x))
        shared = self.shared(y)
        y = self.one(shared) + shared + self.two(self.plain(y))
        turned = self.turned(y[:, :4]).transpose(1, 2)  # the channels are no longer where the layer reads them
        return y.transpose(1, 2).reshape(x.shape) + z + self.wrong(turned).mean()


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net().eval()
    for module in net.modules():
        if getattr(module, "weight", None) is not None and isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.weight.data = torch.tensor([0.1, 1.0, 10.0, 100.0])
            module.bias.data.normal_()
    return net


@pytest.fixture
def x():
    return torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(1))


def smoothed(model, sites, *inputs, alpha=0.5):
    with largest_outputs(model, sites) as largest:
        model(*inputs)
    factors = smoothing_factors(model, sites, largest, alpha)
    smooth_(model, sites, factors)
    return largest, factors


def test_only_what_nothing_else_reads_qualifies(net, x):
    assert smoothable(net, (x[:1],)) == {
        "norm": ("q", "k"), "layer_norm": ("up",), "up": ("down",), "image_norm": ("head",),
    }


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_function_stays_and_the_channels_are_as_the_formula_says(net, x, alpha):
    sites, before = smoothable(net, (x[:1],)), copy.deepcopy(net)
    largest, factors = smoothed(net, sites, x, alpha=alpha)
    with torch.no_grad():
        torch.testing.assert_close(net(x), before(x), rtol=1e-5, atol=1e-4)
    weight = torch.maximum(before.q.weight.abs().amax(0), before.k.weight.abs().amax(0))
    torch.testing.assert_close(factors["norm"], largest["norm"] ** alpha / weight.detach() ** (1 - alpha))
    torch.testing.assert_close(net.q.weight, before.q.weight * factors["norm"])
    torch.testing.assert_close(net.norm.bias, before.norm.bias / factors["norm"])
    assert torch.equal(net.conv.weight, before.conv.weight) and torch.equal(net.one.weight, before.one.weight)


def test_channels_of_zero_are_left_alone(net, x):
    net.norm.weight.data[1], net.norm.bias.data[1], net.q.weight.data[:, 3], net.k.weight.data[:, 3] = 0, 0, 0, 0
    _, factors = smoothed(net, {"norm": ("q", "k")}, x)
    assert factors["norm"][1] == factors["norm"][3] == 1 and bool(torch.isfinite(net.norm.weight).all())


@pytest.mark.parametrize(("name", "per_attention"), [("digits", 1), ("digits_ldm", None)])
def test_of_the_embedded_models_attention_qualifies_and_the_function_stays(name, per_attention):
    model = load_model(name)
    sites = smoothable(model.denoiser, model.example_inputs())
    assert sites and not any("resnets" in maker for maker in sites)
    if per_attention:
        assert all(maker.endswith("group_norm") for maker in sites) and len(sites) == 11
        assert all([r.rpartition(".")[2] for r in readers] == ["to_q", "to_k", "to_v"] for readers in sites.values())
    changed = model.copy_denoiser()
    x = torch.randn(3, *model.sample_shape, generator=torch.Generator().manual_seed(0))
    inputs = (x, torch.tensor([10.0, 400.0, 900.0]), *([] if model.n_classes is None else [torch.arange(3)]))
    smoothed(changed, sites, *inputs)
    with torch.no_grad():
        torch.testing.assert_close(changed(*inputs), model.denoiser(*inputs), rtol=0, atol=1e-5)
