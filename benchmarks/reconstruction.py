"""Iterations of block reconstruction on random weights and inputs, against the block's plain forward and backward.

    python benchmarks/reconstruction.py [--iterations 100] [--turns 5] [--device cuda] [--threads 1]

For a ResBlock (32 -> 64 channels, 8x8) and a transformer block (64 channels, 64 tokens), batch 32, prints ms per
iteration with 4-bit weights, and with 4-bit activations whose quantization is dropped and whose step sizes are learned.
The floor is the full-precision block's forward and backward with respect to its weights; both are timed in turns, and
the ratio is the median over turns, so that other load on the machine hits both alike.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial

import torch
from diffusers.models.attention import Attention, BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from sampling import compare
from torch import nn

from ptq_exp.quantization import (
    PerChannel,
    Policy,
    QuantSpec,
    Rule,
    TensorSpec,
    Widths,
    calibrate_activations_,
    calibrate_weights_,
    quantize_,
)
from ptq_exp.reconstruction import Annealing, BlockData, BlockOptimisation, Calls, Settings, find_blocks

ROWS, BATCH = 192, 32


class Around(nn.Module):
    """A network of one block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args):
        return self.block(*args)


def networks() -> dict[str, tuple[nn.Module, tuple[torch.Tensor, ...]]]:
    """{title: (network, inputs [ROWS, ...])}."""
    torch.manual_seed(0)
    resnet = ResnetBlock2D(in_channels=32, out_channels=64, temb_channels=128, groups=8)
    transformer = BasicTransformerBlock(64, 4, 16, cross_attention_dim=32)
    return {
        "ResBlock 32->64, 8x8": (Around(resnet), (torch.randn(ROWS, 32, 8, 8), torch.randn(ROWS, 128))),
        "transformer block 64, 64 tokens": (
            Around(transformer), (torch.randn(ROWS, 64, 64), None, torch.randn(ROWS, 4, 32)),
        ),
    }


def optimisation(network: nn.Module, inputs: tuple, method: str, iterations: int) -> BlockOptimisation:
    """The optimisation of the one block of `network`."""
    full = network.eval().requires_grad_(False)
    quantized = copy.deepcopy(full)
    one = tuple(None if part is None else part[:1] for part in inputs)
    if method == "qdrop":
        attention = any(isinstance(module, Attention) for module in quantized.modules())
        rules = Policy(first=(), last=(), attention=attention).rules(Widths(4, 4))
    else:
        rules = [Rule("*", QuantSpec(weight=TensorSpec(4, granularity=PerChannel())))]
    quantize_(quantized, rules, one)
    calibrate_weights_(quantized, "mse")
    calibrate_activations_(quantized, "minmax", [inputs])
    (block,) = find_blocks(quantized, ("block",), one)
    calls = Calls.of(inputs, {}, full(*inputs))
    extra = {"input_prob": 0.5, "drop_prob": 0.5, "step_lr": 1e-3} if method == "qdrop" else {}
    # from the first iteration with the regulariser, which is the dearer part
    settings = Settings(Annealing(iterations, warmup=0.0), batch_size=BATCH, lr=1e-2, **extra)
    return BlockOptimisation(block, quantized, full, BlockData(calls, calls), settings, seed=0)


def forward_backward(network: nn.Module, inputs: tuple) -> Callable[[], None]:
    """One plain forward and backward of a full-precision copy on a batch that lies ready."""
    network = copy.deepcopy(network).requires_grad_(True)
    batch = tuple(None if part is None else part[:BATCH] for part in inputs)

    def once() -> None:
        network.zero_grad(set_to_none=True)
        network(*batch).square().sum(1).mean().backward()

    return once


def repeated(function: Callable[[], object], n: int) -> None:
    """Call a function `n` times."""
    for _ in range(n):
        function()


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=100, help="per turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.device}, {args.threads} threads, batch {BATCH}, {args.turns} turns of {args.iterations} iterations")
    print(f"{'block':<34}{'method':<10}{'ms / iteration':>16}{'floor ms':>10}{'ratio':>7}")
    for title, (network, inputs) in networks().items():
        network.to(args.device)
        inputs = tuple(None if part is None else part.to(args.device) for part in inputs)
        for method in ("weights", "qdrop"):
            found = optimisation(network, inputs, method, args.iterations * (args.turns + 1))
            floor = forward_backward(network, inputs)
            ways = {"floor": partial(repeated, floor, args.iterations),
                    "ours": partial(repeated, found.step, args.iterations)}
            plain, ours, ratio = compare(ways, args.turns, args.device)
            plain, ours = plain / args.iterations, ours / args.iterations
            print(f"{title:<34}{method:<10}{ours:>16.2f}{plain:>10.2f}{ratio:>7.2f}", flush=True)


if __name__ == "__main__":
    main()
