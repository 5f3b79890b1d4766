"""What a step, an image, a calibration and a reconstruction cost on a device, for networks of random weights.

    python benchmarks/gpu.py [--networks ddim_cifar10 ddim_imagenet64 ldm4_imagenet256 dit_xl sdxl] [--device cuda]
                             [--repeats 10] [--states 64] [--iterations 50] [--quick] [--json FILE]

For each network, in one process and in turns: milliseconds of one evaluation in float32, in bfloat16, in bfloat16 under
torch.compile, quantized (simulated, W8A8) in float32, the same under torch.compile, by `runtime=torch`, which executes
what it can as integers, and, on a GPU, replayed as a CUDA graph; images per second at the published number of steps.
Then seconds of a calibration on --states states, and of BRECQ with 5,000 iterations per block, from --iterations of the
middle block. Ways that a device cannot run are left out, with their reason. --quick: digits on the CPU, one turn,
nothing compiled.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from runtime import of_zoo
from torch import Tensor, nn

from ptq_exp.calibration import CalibrationSet
from ptq_exp.diffusion import Call, DiTDenoiser
from ptq_exp.errors import PTQError
from ptq_exp.quantization import Policy, Widths, calibrate_, quantize_
from ptq_exp.reconstruction import Annealing, Reconstruction, Settings, find_blocks
from ptq_exp.runtime import GraphedNetwork, runtime_of
from ptq_exp.runtime.cuda_graph import PLAIN
from ptq_exp.runtime.timing import interleaved

ITERATIONS = 5000
Made = tuple[nn.Module, Callable[[int], Call], Policy, tuple[str, ...]]
"""A network, a function that makes calls of n samples, its policy, and the patterns of its blocks."""


class SDXL(nn.Module):
    """The U-Net of Stable Diffusion XL called as eps(x, t, **conditions)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, text: Tensor, pooled: Tensor, size: Tensor) -> Tensor:
        """Return the estimate for states [N, C, H, W]."""
        added = {"text_embeds": pooled, "time_ids": size}
        return self.network(x, t, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)[0]


def zoo(name: str) -> Made:
    """Return a model of the zoo."""
    network, call, policy = of_zoo(name)
    return network, call, policy, ("*resnets.*", "*attentions.*")


def dit_xl(_: str) -> Made:
    """Return DiT-XL/2: 28 blocks of width 1152 on 256 tokens (Peebles and Xie 2023)."""
    network = DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28, sample_size=32,
        patch_size=2, num_embeds_ada_norm=1000,
    )

    def call(n: int) -> Call:
        return Call(torch.randn(n, 4, 32, 32), torch.full((n,), 500.0), {"y": torch.arange(n)})

    policy = Policy(first=("*pos_embed.proj",), last=("*proj_out_2",))
    return DiTDenoiser(network, 1000).eval(), call, policy, ("*transformer_blocks.*",)


def sdxl(_: str) -> Made:
    """Return the U-Net of Stable Diffusion XL, at 1024 x 1024 pixels."""
    network = UNet2DConditionModel(
        sample_size=128, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280), layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=2048,
        transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )

    def call(n: int) -> Call:
        text = {"text": torch.randn(n, 77, 2048), "pooled": torch.randn(n, 1280), "size": torch.ones(n, 6) * 1024}
        return Call(torch.randn(n, 4, 128, 128), torch.full((n,), 500.0), text)

    return SDXL(network.eval()), call, Policy(), ("*resnets.*", "*transformer_blocks.*")


NETWORKS: dict[str, tuple[Callable[[str], Made], int, int]] = {
    "digits": (zoo, 64, 20), "ddim_cifar10": (zoo, 64, 100), "ddim_imagenet64": (zoo, 32, 250),
    "ldm4_imagenet256": (zoo, 16, 20), "dit_xl": (dit_xl, 16, 50), "sdxl": (sdxl, 2, 30),
}
"""Name -> what makes it, samples of one evaluation, sampling steps as published."""


def quantized(network: nn.Module, example: Call, policy: Policy, states: list[Call]) -> tuple[nn.Module, float]:
    """Quantize a copy to 8 bits; returns it and the seconds that its calibration took."""
    made = copy.deepcopy(network).requires_grad_(False)
    quantize_(made, policy.rules(Widths(8, 8)), example)
    started = time.perf_counter()
    calibrate_(made, "mse", states)
    _wait(example.x.device)
    return made, time.perf_counter() - started


def ways_of(
    network: nn.Module, simulated: nn.Module, example: Call, device: torch.device, compile: bool
) -> dict[str, nn.Module]:
    """Return every way to evaluate the network that the device can run, by name; the others are named."""
    half = copy.deepcopy(network).to(torch.bfloat16)
    makers = {
        "float32": lambda: network, "bfloat16": lambda: half, "bfloat16 compiled": lambda: torch.compile(half),
        "quantized": lambda: simulated, "quantized compiled": lambda: torch.compile(simulated),
        "integers": lambda: runtime_of("torch").compile(simulated, example),
        "bfloat16 replayed": lambda: GraphedNetwork(half), "quantized replayed": lambda: GraphedNetwork(simulated),
    }
    found = {}
    for name, make in makers.items():
        if (name.endswith("compiled") and not compile) or (name.endswith("replayed") and device.type != "cuda"):
            continue
        try:
            found[name] = make()
            for _ in range(PLAIN + 1):  # the last of which is recorded, where it is
                _cast(example, name).to(device).evaluate(found[name])
        except (PTQError, RuntimeError) as error:
            found.pop(name, None)
            print(f"  {name}: left out: {str(error).splitlines()[0]}")
    return found


def reconstruction_seconds(
    network: nn.Module, simulated: nn.Module, call: Call, blocks: tuple[str, ...], iterations: int
) -> float:
    """Measure iterations of the middle block, and return the seconds of `ITERATIONS` of all blocks."""
    data = CalibrationSet(
        call.x.cpu().numpy(), torch.zeros(len(call.x), dtype=torch.long).numpy(), call.t.cpu().numpy(),
        torch.arange(len(call.x)).numpy(), conditions={name: value.cpu().numpy() for name, value in
                                                       call.conditions.items()},
    )
    found = find_blocks(simulated, blocks, Call(call.x[:1], call.t[:1], {n: v[:1] for n, v in call.conditions.items()}))
    middle = found[len(found) // 2]
    with TemporaryDirectory() as folder:
        made = Reconstruction(
            simulated, network, [middle], data, Settings(Annealing(iterations), batch_size=min(8, len(call.x))), seed=0,
            batch_size=8, cache_bytes=4e9, folder=Path(folder),
        )
        made.begin()
        made.step()
        _wait(call.x.device)
        started = time.perf_counter()
        for _ in range(iterations - 1):
            made.step()
        _wait(call.x.device)
    return (time.perf_counter() - started) / (iterations - 1) * ITERATIONS * len(found)


@torch.no_grad()
def bench(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one network."""
    make, batch, steps = NETWORKS[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights are what is wanted
        network, call_of, policy, blocks = make(name)
    device = torch.device(args.device)
    network = network.to(device).requires_grad_(False)
    call = call_of(batch).to(device)
    states = [call] * -(-args.states // batch)
    simulated, seconds = quantized(network, call_of(1).to(device), policy, states)
    ways = ways_of(network, simulated, call_of(batch), device, not args.quick)

    def once(way: str) -> None:
        _cast(call, way).evaluate(ways[way])
        _wait(device)

    times = interleaved({way: partial(once, way) for way in ways}, args.repeats)
    row: dict[str, Any] = {"network": name, "device": _name(device), "batch": batch, "steps": steps}
    row |= {f"ms, {way}": found.median for way, found in times.items()}
    row |= {f"images/s, {way}": 1000 * batch / found.median / steps for way, found in times.items()}
    row[f"calibration s, {batch * len(states)} states"] = seconds
    with torch.enable_grad():
        row["reconstruction s"] = reconstruction_seconds(network, simulated, call, blocks, args.iterations)
    if device.type == "cuda":
        row["peak GB"] = torch.cuda.max_memory_allocated(device) / 1e9
        torch.cuda.reset_peak_memory_stats(device)
    return row


def _cast(call: Call, way: str) -> Call:
    """Return the call in the type that a way computes in."""
    if not way.startswith("bfloat16"):
        return call
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in call.conditions.items()}
    return Call(call.x.bfloat16(), call.t, half)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def main() -> None:
    """Parse the command line and print a table, a column for each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS)[1:], choices=list(NETWORKS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--states", type=int, default=64, help="of the calibration that is timed")
    parser.add_argument("--iterations", type=int, default=50, help="of the block that is timed, 2 or more")
    parser.add_argument("--quick", action="store_true", help="digits on the CPU, one turn, nothing compiled")
    parser.add_argument("--json", type=Path, help="write all numbers there, too")
    args = parser.parse_args()
    if args.quick:
        args.networks, args.device, args.repeats, args.states, args.iterations = ["digits"], "cpu", 1, 8, 2
    rows: list[Mapping[str, Any]] = []
    for name in args.networks:
        print(name, flush=True)
        rows.append(bench(name, args))
        if args.json is not None:  # after each: the large ones take minutes
            args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(pd.DataFrame(rows).set_index("network").T.to_markdown(floatfmt=".4g"))


if __name__ == "__main__":
    main()
