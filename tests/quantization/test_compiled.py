"""Quantized networks on a device: no step waits for it, and torch.compile finds one graph."""

from collections import Counter

import pytest
import torch
from small_transformers import built, call_of
from torch.utils._python_dispatch import TorchDispatchMode

from ptq_exp.diffusion import SampleNoise, sample
from ptq_exp.diffusion.time_grid import NoiseSchedule, TimeGrid
from ptq_exp.quantization import Policy, Widths, calibrate_, quantize_
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


def test_a_quantized_network_is_one_graph():
    network, call = quantized("dit"), call_of("dit", 2)
    compiled = torch.compile(network.component, backend="eager", fullgraph=True)  # a break is an error
    with torch.no_grad():
        found = compiled(**network.call(*call[:2], **call[2]), return_dict=False)[0]
        assert torch.equal(found, evaluate(network, call))
