"""One sampling step in full precision and fake-quantized (W8A8), eager and compiled, on random weights.

    python benchmarks/sampling.py [--models ddim_cifar10 ldm4_imagenet256] [--batch 4] [--repeats 5] [--compile]
                                  [--device cuda] [--dtype bfloat16] [--channels-last]

Prints milliseconds per step, the ratio of the fake-quantized network to the full-precision one, and peak memory. The
two are timed in turns and the ratio is the median over turns, so that other load on the machine hits both alike. A
step of a guided model is one evaluation of both halves: twice the batch.
"""

from __future__ import annotations

import argparse
import resource
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from ptq_exp import load_model
from ptq_exp.diffusion import Call, DiffusionModel
from ptq_exp.quantization import Policy, Widths, calibrate_, quantize_
from ptq_exp.runtime.timing import interleaved, ratio


def quantized_copy(model: DiffusionModel, inputs: Call, device: str, activation: int | Sequence[int] = 8) -> nn.Module:
    """8-bit weights, ranges of one noise batch: speed does not depend on their values."""
    quantized = model.copy_denoiser()
    rules = Policy(first=model.first_layers, last=model.last_layers).rules(Widths(8, activation))
    quantize_(quantized, rules, model.example_inputs().to(device))
    first = {name: part[:1] for name, part in inputs.conditions.items()}
    calibrate_(quantized, "minmax", [Call(inputs.x[:1], inputs.t[:1], first)])
    return quantized


def compare(ways: Mapping[str, Callable[[], object]], repeats: int, device: str = "cpu") -> tuple[float, float, float]:
    """Return ms of the first of two ways, of the second, and the second over the first; medians over turns."""

    def waited(way: Callable[[], object]) -> None:
        way()
        if device == "cuda":
            torch.cuda.synchronize()

    times = interleaved({name: partial(waited, way) for name, way in ways.items()}, repeats)
    first, second = ways
    return times[first].median, times[second].median, ratio(times, second, first)


def peak_memory(device: str) -> float:
    """GB since the start, of the device (on a CPU: of the process)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


@torch.no_grad()
def bench(name: str, args: argparse.Namespace) -> None:
    """Print the rows of one model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights are what is wanted
        model = load_model(name, dtype=args.dtype)
    model.denoiser.to(args.device)
    if args.channels_last:
        model.denoiser.to(memory_format=torch.channels_last)
    halves = 2 if model.sampler.guidance_scale != 1 else 1
    n = args.batch * halves
    conditions = {} if model.n_classes is None else {"y": torch.arange(n)}
    inputs = Call(torch.randn(n, *model.sample_shape), torch.full((n,), 500.0), conditions).to(args.device)
    quantized = quantized_copy(model, inputs, args.device)
    for mode in ("eager", "compiled") if args.compile else ("eager",):
        if mode == "compiled":
            model.denoiser.compile()
            quantized.compile()
        ms_full, ms_quantized, relative = compare(
            {"full": partial(inputs.evaluate, model.denoiser), "quantized": partial(inputs.evaluate, quantized)},
            args.repeats, args.device,
        )
        print(f"{name:<22} {mode:<9} {args.batch:>5} {halves:>6} {ms_full:>10.1f} {ms_quantized:>10.1f} "
              f"{relative:>7.2f} {peak_memory(args.device):>8.2f}", flush=True)


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ddim_cifar10", "ldm4_imagenet256"])
    parser.add_argument("--batch", type=int, default=1, help="images per step")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also compiled (minutes on a CPU)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--channels-last", action="store_true")
    args = parser.parse_args()
    print(f"{args.device}, {torch.get_num_threads()} threads, {args.dtype}")
    header = ("model", "mode", "batch", "halves", "FP ms", "W8A8 ms", "ratio", "peak GB")
    print("{:<22} {:<9} {:>5} {:>6} {:>10} {:>10} {:>7} {:>8}".format(*header))
    for name in args.models:
        bench(name, args)


if __name__ == "__main__":
    main()
