"""What the layers of the time alone take on the engine: a network beside the same with constants in their place.

    python benchmarks/time_layers.py [--network ddim_cifar10] [--turns 30]

The time embedding and its projections depend on the sampling step alone and could be looked up in a table. Both
networks are at W8A8 with random weights and compiled with the same settings of OpenVINO. Printed are the CPU time
of one thread, in turns whose order alternates (median and quartiles of the ratio within a turn), and the share of
the layers in the times that OpenVINO itself notes for each node.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings

import numpy as np
import openvino
import torch
from torch import Tensor, nn

from ptq_exp import load_model
from ptq_exp.diffusion import Call
from ptq_exp.quantization import Policy, Widths, calibrate_, quantize_
from ptq_exp.runtime.compilation import traced
from ptq_exp.runtime.deployable import deployable
from ptq_exp.runtime.plan import integer_plan
from ptq_exp.runtime.timing import interleaved

SETTINGS = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
SAMPLES = 4


class Constant(nn.Module):
    """Stands for a layer whose output is known."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, _: Tensor) -> Tensor:
        """Return the known output."""
        return self.value


def tabulated(plain: nn.Module, call: tuple[Tensor, Tensor]) -> nn.Module:
    """Return the network with what its projections of the time make of `call` in their place."""
    made, found = copy.deepcopy(plain), {}
    layers = {name: layer for name, layer in made.named_modules() if name.endswith("time_emb_proj")}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda module, args, output, name=name: found.__setitem__(name, output))
    made(*call)
    for name, value in found.items():
        made.set_submodule(name, Constant(value))
    return made


@torch.no_grad()
def main() -> None:
    """Parse the command line and print the two figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="ddim_cifar10")
    parser.add_argument("--turns", type=int, default=30)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # random weights are what is wanted
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = load_model(args.network)
    network = copy.deepcopy(model.denoiser).requires_grad_(False)
    policy = Policy(first=model.first_layers, last=model.last_layers, weight_symmetric=True)
    quantize_(network, policy.rules(Widths(8, 8)), model.example_inputs())
    calibrate_(network, "minmax", [Call(torch.randn(1, *model.sample_shape), torch.tensor([500.0]), {})])
    plain, call = deployable(network, integer_plan(network)), (torch.randn(SAMPLES, *model.sample_shape),
                                                               torch.full((SAMPLES,), 500.0))
    core, arrays = openvino.Core(), [part.numpy() for part in call]
    models = {"whole": traced(plain, call, ()), "tabulated": traced(tabulated(plain, call), call, ())}
    compiled = {name: core.compile_model(one, "CPU", SETTINGS) for name, one in models.items()}
    ways = {name: lambda one=one: one(arrays) for name, one in compiled.items()}
    times = interleaved(ways, args.turns, clock=time.process_time)
    ratios = np.divide(times["whole"].ms, times["tabulated"].ms)
    low, middle, high = np.percentile(ratios, (25, 50, 75))
    print(f"{args.network}: whole {times['whole'].median:.1f}, tabulated {times['tabulated'].median:.1f} ms; "
          f"whole / tabulated {middle:.3f}, quartiles {low:.3f} to {high:.3f}, {args.turns} turns")
    print(f"share of the layers of the time in the times of all nodes: {share_of_nodes(models['whole'], arrays):.2%}")


def share_of_nodes(model: openvino.Model, arrays: list[np.ndarray]) -> float:
    """Return the share of the layers of the time in OpenVINO's own times of nodes; median of 9 evaluations."""
    request = openvino.Core().compile_model(model, "CPU", {**SETTINGS, "PERF_COUNT": True}).create_infer_request()
    shares = []
    for _ in range(10):
        request.infer(arrays)
        nodes = [(node.node_name, node.real_time.total_seconds()) for node in request.profiling_info]
        of_time = sum(taken for name, taken in nodes if "time_emb" in name or "time_proj" in name)
        shares.append(of_time / sum(taken for _, taken in nodes))
    return float(np.median(shares[1:]))


if __name__ == "__main__":
    main()
