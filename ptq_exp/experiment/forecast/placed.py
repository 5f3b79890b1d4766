"""The quantized network of a forecast: with ranges of noise, and how long the searches for its ranges take."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from ptq_exp.experiment.forecast.probe import BUDGET, Line, measured
from ptq_exp.experiment.forecast.transforms import TransformTime, between
from ptq_exp.parallel import side_by_side
from ptq_exp.quantization import ActivationQuantizer, Report, WeightQuantizer

_QUICK = "minmax"  # the range search of what is not timed
_WEIGHTS, _RANGES = 1.5 * BUDGET, 6  # seconds for weights, of every shape one, and how many activations are timed
_LARGEST = 4_000_000  # values of a weight that is timed first; larger ones where there is time


@dataclass
class Placed:
    """The quantized network that a plan makes, with ranges of noise: as fast and as large as the calibrated one.

    Attributes:
        weights: seconds of the range search of all weights, and of their rounding.
        ranges: seconds of the range search of all activations, of all bins.
        observed: speed of an evaluation in which activations are recorded.
        transforms: what was measured of each.
        placing: seconds of copying it and of placing its quantizers, where its weights lie in files; else few, and 0.
    """

    network: nn.Module
    report: Report
    weights: float
    ranges: float
    observed: Line
    transforms: tuple[TransformTime, ...] = ()
    placing: float = 0.0


@torch.no_grad()
def give_weights_ranges_(
    network: nn.Module, metric: str, device: torch.device, left_out: Callable[[str], bool] | None = None,
    before: Callable[[nn.Module], object] = lambda layer: None,
) -> float:
    """Give weights ranges, but for layers `left_out`; returns the seconds that `metric` takes for all weights.

    Args:
        before: called with each layer before it is timed.
    """
    layers = {name: m for name, m in network.named_modules()
              if isinstance(getattr(m, "weight_quantizer", None), WeightQuantizer)}
    shapes: dict[tuple[int, ...], list[nn.Module]] = {}
    taken = [layer for name, layer in layers.items() if left_out is None or not left_out(name)]
    for layer in sorted(taken, key=lambda layer: layer.weight.numel()):
        shapes.setdefault(tuple(layer.weight.shape), []).append(layer)
    timed = _timed_searches([*shapes.values()], metric, device, before)
    for layer in (layer for alike in shapes.values() for layer in alike):
        if not layer.weight_quantizer.ready:
            layer.weight_quantizer.search(layer.weight, _QUICK)
    sizes = {math.prod(shape): seconds for shape, seconds in timed.items()}
    return sum(timed.get(tuple(m.weight.shape), between(sizes, m.weight.numel())) for m in layers.values())


def _timed_searches(
    alike: Sequence[Sequence[nn.Module]], metric: str, device: torch.device, before: Callable[[nn.Module], object]
) -> dict[tuple[int, ...], float]:
    """Return the seconds that the search of a weight takes, by its shape, where those of a network are side by side.

    Args:
        alike: layers whose weights have one shape; those that matter most are timed.
    """
    timed: dict[tuple[int, ...], float] = {}
    sizes: dict[int, float] = {}
    searches: list[Callable[[], None]] = []
    weights = [(len(layers), layers[0], cast("Tensor", layers[0].weight)) for layers in alike]
    order = sorted(weights, key=lambda found: (found[2].numel() > _LARGEST, -found[0] * found[2].numel() ** 0.5))
    for _, layer, weight in order:
        left = _WEIGHTS - sum(timed.values())
        if timed and (left <= 0 or (weight.numel() > _LARGEST and between(sizes, weight.numel()) > left)):
            continue
        before(layer)
        searches.append(partial(cast("WeightQuantizer", layer.weight_quantizer).search, weight, metric))
        timed[tuple(weight.shape)], _ = measured(searches[-1], device)
        sizes[weight.numel()] = timed[tuple(weight.shape)]
    if device.type != "cpu" or torch.get_num_threads() == 1 or not timed:
        return timed
    for _, layer, weight in order:
        if tuple(weight.shape) in timed:
            before(layer)
    together, _ = measured(partial(side_by_side, searches), device)
    return {shape: seconds * together / sum(timed.values()) for shape, seconds in timed.items()}


def give_ranges_(
    activations: Sequence[ActivationQuantizer], metric: str, device: torch.device, *, timed: bool
) -> float:
    """Give those of all activations that saw data ranges of it; returns the seconds that `metric` takes for all."""
    seen = [quantizer for quantizer in activations if quantizer.saw_data]
    chosen = seen[:: max(1, len(seen) // _RANGES)] if timed else []
    seconds = [measured(partial(each.finish, metric), device)[0] for each in chosen]
    for quantizer in seen:
        if quantizer.saw_data:  # those that were timed have theirs
            quantizer.finish(_QUICK)
    return len(activations) * sum(seconds) / len(seconds) if seconds else 0.0
