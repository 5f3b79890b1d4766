"""Time and error of the range search against two exhaustive ones, on one CPU thread.

    python benchmarks/range_search.py

Tensors: activations of 32 x 128 x 32 x 32 values, one quantizer for all (`outliers`: Gaussian, 1 % of the
values five times as large; `silu`: SiLU of a Gaussian), and a convolution weight 256 x 256 x 3 x 3 (Gaussian,
another spread for each output channel), one quantizer per output channel.

(a) is the exhaustive symmetric search: thresholds i/100 of the largest absolute value, i = 1..100, one
    candidate after the other, the least mean |x - q(x)|^2.4 wins (per channel).
(b) is the exhaustive asymmetric search over 100 ranges x 2^bits zero points. It takes hours, so a few of its
    candidates are timed and the time of all is extrapolated; its error is not known here.

Times are CPU seconds (`time.process_time`, best of several runs for ours, one run of all candidates for (a)).
Error is the mean |x - q(x)|^2.4 of the quantizer found, relative to (a)'s.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ptq_exp.quantization import QRange, fake_quantize, search_range

CANDIDATES = 100


def tensors() -> dict[str, tuple[Tensor, int | None]]:
    """Name -> (tensor, channel axis), seeded."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(32, 128, 32, 32, generator=generator)
    outliers = torch.where(torch.rand(normal.shape, generator=generator) < 0.01, 5 * normal, normal)
    spread = 0.02 * torch.rand(256, 1, 1, 1, generator=generator) + 0.01
    weight = spread * torch.randn(256, 256, 3, 3, generator=generator)
    silu = torch.nn.functional.silu(0.2 + 1.6 * normal)
    return {"activation outliers": (outliers, None), "activation silu": (silu, None), "weight": (weight, 0)}


def candidate_error(x: Tensor, qrange: QRange, axis: int | None) -> Tensor:
    """Mean |x - q(x)|^2.4 over all of `x`, or for each channel, keeping dimensions."""
    error = (x - fake_quantize(x, *qrange)).abs().pow(2.4)
    return error.mean() if axis is None else error.mean(dim=tuple(range(1, x.ndim)), keepdim=True)


def grid(x: Tensor, axis: int | None, bits: int, fraction: float, zero_point: float) -> QRange:
    """Unsigned grid of 2^bits levels over `fraction` of twice the largest absolute value."""
    peak = x.abs().amax() if axis is None else x.abs().amax(dim=tuple(range(1, x.ndim)), keepdim=True)
    scale = fraction * 2 * peak / (2**bits - 1)
    return QRange(scale, *(torch.full_like(scale, value) for value in (zero_point, 0, 2**bits - 1)))


def exhaustive(x: Tensor, axis: int | None, bits: int) -> QRange:
    """Search (a)."""
    best, least = None, None
    for i in range(1, CANDIDATES + 1):
        trial = grid(x, axis, bits, i / CANDIDATES, 2 ** (bits - 1))
        error = candidate_error(x, trial, axis)
        if best is None:
            best, least = trial, error
        better = error < least
        best = QRange(*(torch.where(better, new, old) for new, old in zip(trial, best, strict=True)))
        least = torch.minimum(error, least)
    return best


def two_dimensional_seconds(x: Tensor, axis: int | None, bits: int, timed: int) -> float:
    """CPU seconds of search (b), extrapolated from `timed` of its 100 * 2^bits candidates."""
    start = time.process_time()
    for i in range(timed):
        candidate_error(x, grid(x, axis, bits, 1 - i / CANDIDATES, i), axis)
    return (time.process_time() - start) / timed * CANDIDATES * 2**bits


def timed(run: Callable[[], QRange], repeats: int) -> tuple[float, QRange]:
    """Least CPU seconds of `repeats` runs, and the result."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        result = run()
        seconds.append(time.process_time() - start)
    return min(seconds), result


def compare(name: str, x: Tensor, axis: int | None, bits: int, repeats: int, candidates: int) -> None:
    """Prints two rows of the table: our symmetric and our asymmetric search against (a) and (b)."""
    seconds_a, found_a = timed(lambda: exhaustive(x, axis, bits), 1)
    seconds_b = two_dimensional_seconds(x, axis, bits, candidates)
    error_a = float(candidate_error(x, found_a, axis).mean())
    for label, symmetric in (("symmetric", True), ("asymmetric", False)):
        search = partial(search_range, x, bits, symmetric=symmetric, channel_axis=axis, metric="lp")
        seconds, found = timed(search, repeats)
        error = float(candidate_error(x, found, axis).mean())
        print(
            f"{name:20} {bits:4} {label:10} {seconds:7.3f} {seconds_a:6.2f} {seconds_b:6.0f} "
            f"{seconds_a / seconds:8.1f} {seconds_b / seconds:8.0f} {error:10.3e} {error / error_a:9.4f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and error of the range search.")
    parser.add_argument("--repeats", type=int, default=10, help="runs of our search, the fastest counts")
    parser.add_argument("--timed", type=int, default=3, help="candidates of (b) that are timed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{'tensor':20} {'bits':>4} {'ours':10} {'ours s':>7} {'(a) s':>6} {'(b) s':>6} "
        f"{'(a)/ours':>8} {'(b)/ours':>8} {'error':>10} {'error/(a)':>9}"
    )
    for name, (x, axis) in tensors().items():
        for bits in (8, 4):
            compare(name, x, axis, bits, arguments.repeats, arguments.timed)
    print(f"(b) is extrapolated from {arguments.timed} of its {CANDIDATES} x 2^bits candidates.")


if __name__ == "__main__":
    main()
