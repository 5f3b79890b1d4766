"""What it costs to change the activation width between sampling steps, on the embedded models and random weights.

    python benchmarks/bit_schedule.py [--models digits digits_ldm ddim_cifar10] [--batch 16] [--repeats 20]

Prints milliseconds per step of a network with one activation width (W8A8), of one with two candidates whose width
changes at every step (W8A4 and W8A8 in turns, found by its network time), and the ratio: the median over turns, so that
other load on the machine hits both alike.
"""

from __future__ import annotations

import argparse
import warnings
from itertools import cycle

import torch
from sampling import compare, quantized_copy

from ptq_exp import load_model
from ptq_exp.correction import Scheduled
from ptq_exp.diffusion import Call


@torch.no_grad()
def bench(name: str, batch: int, repeats: int) -> None:
    """Print the row of one model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights are what is wanted
        model = load_model(name)
    grid = model.time_grid(20)
    conditions = {} if model.n_classes is None else {"y": torch.arange(batch) % model.n_classes}
    x = torch.randn(batch, *model.sample_shape)
    steps = [Call(x, grid.network_time(step, batch), conditions) for step in range(len(grid))]
    single = quantized_copy(model, steps[0], "cpu")
    scheduled = Scheduled(quantized_copy(model, steps[0], "cpu", (4, 8)), torch.arange(len(grid)) % 2, grid)
    calls = {"single": (single, cycle(steps)), "scheduled": (scheduled, cycle(steps))}
    ways = {name: lambda way=way, of=of: next(of).evaluate(way) for name, (way, of) in calls.items()}
    one, two, ratio = compare(ways, repeats)
    print(f"{name:<22} {batch:>5} {one:>10.2f} {two:>14.2f} {ratio:>7.3f}", flush=True)


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["digits", "digits_ldm", "ddim_cifar10"])
    parser.add_argument("--batch", type=int, default=16, help="samples per step")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads")
    print("{:<22} {:>5} {:>10} {:>14} {:>7}".format("model", "batch", "W8A8 ms", "W8A4|W8A8 ms", "ratio"))
    for name in args.models:
        bench(name, args.batch, args.repeats)


if __name__ == "__main__":
    main()
