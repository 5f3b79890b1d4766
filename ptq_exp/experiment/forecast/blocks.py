"""How long a reconstruction takes: a few optimiser steps of a few blocks, and what all others are in proportion."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from ptq_exp.experiment.forecast.probe import measured
from ptq_exp.experiment.forecast.speeds import Speeds
from ptq_exp.experiment.forecast.work import OBSERVED
from ptq_exp.experiment.reconstruct import blocks_of, settings_of
from ptq_exp.reconstruction import Block, Reconstruction
from ptq_exp.settings.schema import ReconstructionConfig

_TIMED = 3  # blocks
_STEPS = 2  # of each


def reconstruction_seconds(speeds: Speeds, config: ReconstructionConfig, states: int) -> float | None:
    """Return the seconds of reconstructing all blocks on `states` calibration states; None where nobody knows.

    An iteration takes a time between those of the blocks that were tried, by multiply-accumulates. What enters and
    leaves a block is captured from both networks, each of which runs as far as the block: half of it on average.
    """
    if not config.active:
        return 0.0
    if config.method != "learned":
        return None
    run, plan, network = speeds.run, speeds.plan, speeds.placed.network
    reference = run.model.denoiser.to(run.device)
    blocks = blocks_of(run, plan, config, network, reference)
    macs = {row.name: row.macs for row in speeds.placed.report.rows}
    sizes = [sum(macs.get(f"{block.name}.{layer}".strip("."), 0) for layer in block.layers) for block in blocks]
    order = np.argsort(sizes, kind="stable")
    chosen = {int(order[round(k * (len(blocks) - 1) / (_TIMED - 1))]) for k in range(_TIMED)}
    timed = sorted((sizes[place], _step_seconds(speeds, config, blocks[place])) for place in chosen)
    steps = np.interp(sizes, [size for size, _ in timed], [seconds for _, seconds in timed])
    iterations = [settings_of(config).iterations(block) for block in blocks]
    evaluations = states / plan.batch_size
    captured = speeds.full.seconds(plan.batch_size, evaluations) + speeds.of(OBSERVED).seconds(
        plan.batch_size, evaluations
    )
    return float(np.dot(steps, iterations)) + 0.5 * captured * len(blocks)


def _step_seconds(speeds: Speeds, config: ReconstructionConfig, block: Block) -> float:
    run, plan = speeds.run, speeds.plan
    states = speeds.calibration_set(max(2, min(2 * config.batch_size, 64)))
    with tempfile.TemporaryDirectory(prefix="ptq_exp_") as folder:
        tried = Reconstruction(
            speeds.placed.network, run.model.denoiser, [block], states, settings_of(config), seed=0,
            batch_size=plan.batch_size, cache_bytes=1e9, folder=Path(folder),
            row_of_step=plan.time_bins if plan.n_bins > 1 else None,
        )
        with torch.enable_grad():
            tried.begin()
            tried.step()
            seconds, _ = measured(lambda: [tried.step() for _ in range(_STEPS)], run.device)
        tried.arena.clear()
    share = min(1.0, len(states) * 7 / 8 / config.batch_size)  # of a batch that so few states fill
    return seconds / _STEPS / share
