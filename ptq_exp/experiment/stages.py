"""The stages that make a quantized network: calibration set, then quantizers with their ranges."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ptq_exp.calibration import CalibrationSet
from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.diffusion import Call, TimeGrid
from ptq_exp.experiment.blockwise import calibrate_blocks
from ptq_exp.experiment.keys import Keys
from ptq_exp.experiment.plan import Plan, drawn_positions, drawn_states
from ptq_exp.experiment.policy import policy
from ptq_exp.experiment.ranges import calibrate
from ptq_exp.experiment.run import Run
from ptq_exp.experiment.stage import Key, cached
from ptq_exp.experiment.transforms import transform_
from ptq_exp.lightning import CalibrationModule, RecordingModule, collect_calibration_set, record_calibration_set
from ptq_exp.pipelines import PipelineModel, RecordedModel
from ptq_exp.quantization import quantize_
from ptq_exp.quantization.stored import range_arrays, restore_ranges_
from ptq_exp.settings.schema import CalibrationConfig

log = logging.getLogger("ptq_exp")


def make_calibration_set(
    run: Run, config: CalibrationConfig, key: Key, images: Any = None, previous: QuantizedModel | None = None,
    which: str = "",
) -> CalibrationSet:
    """Collect (or reuse) the calibration set that the settings describe.

    Args:
        key: of the set, see `Keys.calibration`.
        images: real images to start from, uint8 [N, H, W, C].
        previous: the quantized model of the round before, whose states are taken; None = those of full precision.
        which: the round, for the log.
    """
    if isinstance(run.model, RecordedModel):
        return _given_calls(run.model, run.grid)
    if config.source is None:
        log.info("calibration=%s: no states are collected, as no activation has a range to calibrate", config.name)
        return _noise_alone(run)

    def make(folder: Path) -> CalibrationSet:
        denoiser = run.full_precision if previous is None else previous.uncorrected
        if isinstance(run.model, PipelineModel):
            return record_calibration_set(
                RecordingModule(run.model, run.grid, seed=run.seed, denoiser=denoiser), run.trainer("calibration set"),
                drawn_positions(config, len(run.grid), run.seed, config.steps_per_sample), config.batch_size, folder,
            )
        states = drawn_states(config, run.grid, run.seed)
        module = CalibrationModule(
            run.model, run.grid, config.source, seed=run.seed, images=images, denoiser=denoiser
        )
        return collect_calibration_set(
            module, run.trainer("calibration set"), states, config.batch_size, folder, guided=run.guidance_scale != 1
        )

    return cached(
        run.cache, "calibration", key, make, f"calibration set {config.name}{which}", save=CalibrationSet.save,
        load=CalibrationSet.load,
        detail=lambda s: f", {len(s)} states, {int(s.evaluations.sum())} network evaluations",
    )


def _noise_alone(run: Run) -> CalibrationSet:
    """Return two states of noise at the first step, to prove a quantized network by; nothing is calibrated on them."""
    example = run.model.example_inputs().expanded(2)
    draw = torch.Generator().manual_seed(run.seed)
    x, first = torch.randn(example.x.shape, generator=draw), torch.zeros(2, dtype=torch.long)
    return CalibrationSet.of(example._replace(x=x, t=run.grid.network_time(first)), first)


def _given_calls(model: RecordedModel, grid: TimeGrid) -> CalibrationSet:
    """Return the calibration set of the calls that somebody has recorded, each row a state."""
    call = Call(
        torch.cat([call.x for call in model.calls]), torch.cat([call.t for call in model.calls]),
        {name: torch.cat([call.conditions[name] for call in model.calls]) for name in model.calls[0].conditions},
    )
    return CalibrationSet.of(call, grid.step_of(call.t))


def quantize_model(
    run: Run, plan: Plan, keys: Keys, calibration_set: CalibrationSet, calibration_round: int = 1
) -> QuantizedModel:
    """Quantize a copy of the model's network, and calibrate it (or give it the ranges of an earlier run).

    Its weights hold their quantized values: sampling does not quantize them again at every step.
    """
    network = run.network_copy()
    example = run.example()
    rules = policy(plan, run.model, network, example)
    transforms = transform_(run, plan, keys, network, calibration_set, calibration_round, rules)
    report = quantize_(network, rules, example)

    def make(folder: Path) -> dict[str, np.ndarray]:
        if run.blockwise:
            calibrate_blocks(run, plan, network, calibration_set, folder)
        else:
            calibrate(run, plan, network, report, calibration_set)
        return range_arrays(network)

    cached(
        run.cache, "ranges", keys.ranges(calibration_round), make, "ranges",
        when_reused=lambda arrays: restore_ranges_(network, arrays),
    )
    correction = keys.config.correction
    variance = correction.variance and not isinstance(run.model, PipelineModel)
    return QuantizedModel(
        run.model, network, report, run.grid, run.guidance_scale, tuple(rules), tuple(plan.widths),
        plan.time_bins if plan.n_bins > 1 else None, variance=variance, convention=correction.convention,
        transforms=transforms, compile=run.compile, cuda_graph=run.cuda_graph,
    )
