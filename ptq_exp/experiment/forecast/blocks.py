"""How long a reconstruction takes: a few optimiser steps, or GPTQ, of a few blocks, and all others in proportion."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ptq_exp.calibration import CalibrationSet
from ptq_exp.experiment.forecast.probe import measured
from ptq_exp.experiment.forecast.speeds import Speeds
from ptq_exp.experiment.forecast.work import OBSERVED
from ptq_exp.experiment.reconstruct import blocks_of, settings_of
from ptq_exp.reconstruction import Block, Reconstruction
from ptq_exp.reconstruction.run import HELD_OUT
from ptq_exp.settings.schema import ReconstructionConfig

_STEPS = 2  # of each block that is tried
_GPTQ_STATES = 8, 24
_PATIENCE = 10.0  # seconds after which no further block is tried


def reconstruction_seconds(speeds: Speeds, config: ReconstructionConfig, states: int) -> float:
    """Return the seconds of reconstructing all blocks on `states` calibration states.

    A block takes a time between those of the blocks that were tried, by multiply-accumulates. What enters and leaves a
    block is captured from both networks; GPTQ needs what enters alone, and the full-precision network for the states
    that judge it.
    """
    if not config.active:
        return 0.0
    run, plan, network = speeds.run, speeds.plan, speeds.placed.network
    reference = run.model.denoiser.to(run.device)
    blocks = blocks_of(run, plan, config, network, reference)
    macs = {row.name: row.macs for row in speeds.placed.report.rows}
    sizes = [sum(macs.get(f"{block.name}.{layer}".strip("."), 0) for layer in block.layers) for block in blocks]
    learned, rows = config.method == "learned", speeds.halves
    settings = settings_of(config)
    times = [settings.iterations(block) if learned else 1 for block in blocks]
    measure = _step_seconds if learned else partial(_gptq_seconds, states=rows * states)
    near = [place for place, block in enumerate(blocks) if speeds.passed(block.name)]
    each = np.interp(sizes, *_tried(sizes, near, lambda place: measure(speeds, config, blocks[place])))
    evaluations = states / plan.batch_size
    full = speeds.full.seconds(plan.batch_size, evaluations)  # of both halves of guidance
    quantized = speeds.of(OBSERVED).seconds(rows * plan.batch_size, evaluations)
    captured = quantized + (full if learned else full / HELD_OUT)
    # on a GPU the network runs as far as each block, half of it on average; else finished blocks answer from memory or
    # files, and each runs twice: captured, and for the blocks behind it
    passes = 0.5 * len(blocks) if run.device.type == "cuda" else 2.0
    return float(np.dot(each, times)) + passes * captured


def _tried(
    sizes: Sequence[float], near: Sequence[int], measure: Callable[[int], float]
) -> tuple[list[float], list[float]]:
    """Return sizes of blocks, ascending, and what was measured of them: the middle one, and both ends where quick.

    Beyond what was measured seconds are in proportion to sizes.

    Args:
        near: places of the blocks that can be measured.
    """
    order, measured_of = sorted(near, key=lambda place: sizes[place]), dict[int, float]()
    places = [int(order[round(share * (len(order) - 1))]) for share in (0.5, 0.0, 1.0)]
    started = time.perf_counter()
    for place in places:
        if place not in measured_of and (not measured_of or time.perf_counter() - started < _PATIENCE):
            measured_of[place] = measure(place)
    found = {size: [measured_of[place] for place in measured_of if sizes[place] == size]
             for size in sorted({sizes[place] for place in measured_of})}
    curve = {size: sum(seconds) / len(seconds) for size, seconds in found.items()}
    least, largest, most = min(curve), max(curve), max(sizes)
    below = {0.0: 0.0} if least > min(sizes) else {}  # in proportion, from nothing
    above = {most: curve[largest] * most / max(largest, 1)} if most > largest else {}
    curve = below | curve | above
    return [*curve], [*curve.values()]


def _begun(speeds: Speeds, config: ReconstructionConfig, block: Block, n: int, folder: Path) -> Reconstruction:
    """Return the reconstruction of a block alone, on `n` states of noise, ready for its first step."""
    run, plan = speeds.run, speeds.plan
    made = Reconstruction(
        speeds.placed.network, run.model.denoiser, [block], _states(speeds, n), settings_of(config), seed=0,
        batch_size=plan.batch_size, cache_bytes=1e9, folder=folder,
        row_of_step=plan.time_bins if plan.n_bins > 1 else None,
    )
    made.begin()
    return made


def _states(speeds: Speeds, n: int) -> CalibrationSet:
    """Return `n` states of noise, spread over the sampling steps."""
    steps = torch.linspace(0, len(speeds.run.grid) - 1, n).long()
    return CalibrationSet.of(speeds.call(n)._replace(t=speeds.run.grid.network_time(steps)), steps)


def _step_seconds(speeds: Speeds, config: ReconstructionConfig, block: Block) -> float:
    """Return the seconds of an optimiser step."""
    n = max(2, min(2 * config.batch_size, 64))
    with tempfile.TemporaryDirectory(prefix="ptq_exp_") as folder, torch.enable_grad():
        tried = _begun(speeds, config, block, n, Path(folder))
        tried.step()
        seconds, _ = measured(lambda: [tried.step() for _ in range(_STEPS)], speeds.run.device)
        tried.arena.clear()
    share = min(1.0, n * (HELD_OUT - 1) / HELD_OUT / config.batch_size)  # of a batch that so few states fill
    return seconds / _STEPS / share


def _gptq_seconds(speeds: Speeds, config: ReconstructionConfig, block: Block, states: int) -> float:
    """Return the seconds of all layers of a block: sums over `states` states, then roundings, whatever the states."""

    def seconds_of(n: int) -> float:
        with tempfile.TemporaryDirectory(prefix="ptq_exp_") as folder:
            tried = _begun(speeds, config, block, n, Path(folder))
            layers = range(tried.iterations)
            seconds, _ = measured(lambda: [tried.step() for _ in layers], speeds.run.device)
            tried.current.revert()
            tried.arena.clear()
        return seconds

    few, more = _GPTQ_STATES
    of_few = seconds_of(few)
    if of_few < _PATIENCE:  # what is used first is slow
        of_few = seconds_of(few)
    each = max(seconds_of(more) - of_few, 0.0) / (more - few)
    return max(of_few + each * (states - few), 0.0)
