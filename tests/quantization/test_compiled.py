"""Quantized networks on a device: no step waits for it, and torch.compile finds one graph."""

import sys
from collections import Counter

import pytest
import torch
from small_transformers import built, call_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ptq_exp.diffusion import SampleNoise, sample
from ptq_exp.diffusion.time_grid import NoiseSchedule, TimeGrid
from ptq_exp.quantization import (
    Policy,
    QuantSpec,
    Rule,
    TensorSpec,
    Widths,
    calibrate_,
    disabled,
    quantize_,
    quantizers,
    set_mode,
)
from ptq_exp.quantization.products import QuantMultiplier
from ptq_exp.quantization.quantizer import Mode
from ptq_exp.quantization.trace.evaluate import evaluate


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def quantized(name):
    network = built(name).eval().requires_grad_(False)
    quantize_(network, Policy(first=(), last=()).rules(Widths(8, 8)), call_of(name))
    calibrate_(network, "minmax", [call_of(name, 2)])
    return network


@pytest.mark.parametrize("name", ["unet", "sd15", "dit", "sd3", "flux", "sana"])
def test_no_value_of_a_quantized_evaluation_is_read_by_the_host(name):
    network, call = quantized(name), call_of(name, 2)
    with torch.no_grad(), Operators() as seen:
        evaluate(network, call)
    assert seen.counts["_local_scalar_dense"] == 0 and sum(seen.counts.values()) > 100


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_no_step_of_the_sampler_reads_a_value(eta):
    grid = TimeGrid.from_schedule(NoiseSchedule.latent_diffusion(), 3, eta=eta)
    with Operators() as seen:
        sample(lambda x, t: x * 0.1, grid, SampleNoise(0, [0, 1], (3, 4, 4)))
    assert seen.counts["_local_scalar_dense"] == 0


@pytest.mark.parametrize("name", ["dit", "sd3", "flux", "sana"])
def test_a_quantized_network_is_one_graph(name):
    network, call = quantized(name), call_of(name, 2)
    compiled = torch.compile(network.component, backend="eager", fullgraph=True)  # a break is an error
    with torch.no_grad():
        found = compiled(**network.call(*call[:2], **call[2]), return_dict=False)[0]
        assert torch.equal(found, evaluate(network, call))


class Attention(nn.Module):
    """softmax(x x^T) x, in other words each time; `between` is called between the two products."""

    def __init__(self, between=lambda: None):
        super().__init__()
        self.qk, self.out, self.between = nn.Linear(6, 12), nn.Linear(6, 6), between

    def forward(self, x):
        q, k = self.qk(x).chunk(2, -1)
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        self.between()
        return self.out(torch.bmm(weights, x)) + torch.einsum("nij,njk->nik", weights, k) + weights.matmul(q)


class Model(nn.Module):
    def __init__(self, between=lambda: None):
        super().__init__()
        self.first, self.core, self.last = nn.Linear(6, 6), Attention(between), nn.Linear(6, 6)

    def forward(self, x):
        return self.last(self.core(self.first(x)))


def with_products(between=lambda: None):
    torch.manual_seed(0)
    network, x = Model(between).requires_grad_(False), torch.randn(2, 5, 6)
    quantize_(network, [Rule("*", QuantSpec(TensorSpec(4), TensorSpec(4), product=TensorSpec(4)))], (x[:1],))
    calibrate_(network, "minmax", [(x,)])
    assert isinstance(network.core, QuantMultiplier) and len(network.core.products) == 4
    return network, torch.randn(2, 5, 6)


def test_products_in_all_spellings_are_quantized_in_one_graph():
    network, x = with_products()
    assert torch.equal(torch.compile(network, backend="eager", fullgraph=True)(x), network(x))


def test_a_compiled_network_sees_which_quantizers_are_on():
    network, x = with_products()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    some = [quantizer for _, quantizer in quantizers(network)][::2]
    found = []
    for mode in (Mode.QUANTIZE, Mode.OFF, Mode.QUANTIZE):
        set_mode(network, Mode.QUANTIZE)
        for quantizer in some:
            quantizer.mode = mode
        found.append(compiled(x))
        assert torch.allclose(found[-1], network(x), atol=1e-6)
    with disabled(network):
        assert torch.allclose(compiled(x), network(x), atol=1e-6)
    assert torch.equal(found[0], found[2]) and (found[0] - found[1]).abs().max() > 0.01


def test_what_cannot_be_traced_is_quantized_once_nevertheless():
    seen = []
    network, x = with_products(lambda: seen.append(sys.intern("called")) or torch._dynamo.graph_break())
    wanted = network(x)
    before = len(seen)
    assert torch.equal(torch.compile(network, backend="eager")(x), wanted)
    assert torch.allclose(torch.compile(network, backend="aot_eager")(x), wanted, atol=1e-6)
    assert len(seen) == before + 2
