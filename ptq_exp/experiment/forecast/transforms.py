"""How long transforms take to fit: their passes over the calibration set, and a few of the places where they work."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ptq_exp.experiment.forecast.probe import BUDGET, Line, measured
from ptq_exp.quantization import Fitting, Rule, Transform

_SITES = 4  # that are timed, unless they take longer than this many seconds
_PATIENCE = 10 * BUDGET


@dataclass(frozen=True)
class TransformTime:
    """What one transform takes.

    Attributes:
        passes: over the calibration set.
        each: speed of an evaluation of such a pass, in which the layers concerned are watched.
        fitted: seconds of everything else.
    """

    passes: int
    each: Line
    fitted: float

    def seconds(self, batch: int, states: int) -> float:
        """Return the seconds on so many calibration states."""
        return self.fitted + self.passes * self.each.seconds(batch, states / batch)


class _Shown(Exception):
    """The pass was timed, and what follows it is not wanted."""


@torch.no_grad()
def transform_time(
    network: nn.Module, transform: Transform, sites: dict[str, tuple[str, ...]], rules: Sequence[Rule],
    evaluate: Callable[[nn.Module], object], line: Callable[[nn.Module], Line], device: torch.device,
    near: dict[str, tuple[str, ...]] | None = None,
) -> TransformTime:
    """Fit a transform at a few places, and derive what all take; nothing is changed.

    Args:
        sites: where it works.
        evaluate: evaluates a network on a few samples.
        line: measures the speed of its evaluations.
        near: those of `sites` that are reached by what both evaluate; None = all.
    """
    lines, near = list[Line](), sites if near is None else near

    def only_once(shown: nn.Module) -> None:
        lines.append(line(shown))
        raise _Shown

    with suppress(_Shown):
        transform.fit(network, near, Fitting(only_once, rules))
    if not lines:  # nothing is looked at, and nothing fitted that depends on it
        seconds, _ = measured(lambda: transform.fit(network, near, Fitting(evaluate, rules)), device)
        return TransformTime(0, Line(0.0, 0.0), seconds * len(sites) / max(1, len(near)))
    if not near:
        return TransformTime(1, lines[0], 0.0)
    sizes = {site: sum(network.get_submodule(name).weight.numel() for name in names) for site, names in sites.items()}
    order = sorted(near, key=lambda site: sizes[site])
    passes, timed, started = 1, {}, time.perf_counter()
    for place in dict.fromkeys(round(share * (len(order) - 1)) for share in (0.5, *np.linspace(0, 1, _SITES))):
        if timed and time.perf_counter() - started > _PATIENCE:
            break
        site, shown = order[place], []

        def show(shown_network: nn.Module, shown: list[float] = shown) -> None:
            begun = time.perf_counter()
            evaluate(shown_network)
            shown.append(time.perf_counter() - begun)

        seconds, _ = measured(
            lambda site=site, show=show: transform.fit(network, {site: sites[site]}, Fitting(show, rules)), device
        )
        timed[sizes[site]] = max(seconds - sum(shown), 0.0)
        passes = max(passes, len(shown))
    return TransformTime(passes, lines[0], sum(between(timed, size) for size in sizes.values()))


def between(timed: dict[int, float], size: int) -> float:
    """Return the seconds of what has `size` values: between the sizes that were timed, in proportion beyond them."""
    if not timed:
        return 0.0
    sizes = sorted(timed)
    if size > sizes[-1]:
        return timed[sizes[-1]] * size / sizes[-1]
    return float(np.interp(size, sizes, [timed[known] for known in sizes]))
