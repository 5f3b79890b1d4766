"""From a calibration set to the quantized model: the half of an experiment that scripts need, too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ptq_exp.calibration import CalibrationSet
from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.experiment.choices import Choices, at_widths
from ptq_exp.experiment.choose_bits import best_choice, measure_alone
from ptq_exp.experiment.correction import fit_correction
from ptq_exp.experiment.execution import executed_by
from ptq_exp.experiment.keys import Keys
from ptq_exp.experiment.plan import Plan
from ptq_exp.experiment.ranges import prove
from ptq_exp.experiment.reconstruct import reconstruct
from ptq_exp.experiment.run import Run
from ptq_exp.experiment.saved import recipe
from ptq_exp.experiment.schedule import schedule_bits
from ptq_exp.experiment.stage import Stages
from ptq_exp.experiment.stages import make_calibration_set, quantize_model
from ptq_exp.settings.schema import ExperimentConfig


def make_quantized(
    run: Run, config: ExperimentConfig, stage: Stages, images: Any, choices: Choices | None
) -> tuple[QuantizedModel, ExperimentConfig]:
    """Make the quantized model: calibration set, bits, ranges, roundings, bit schedule, correction.

    Args:
        images: real images that calibration starts from, if any.
        choices: of bits, where they are chosen.

    Returns:
        The model, and the settings that make it: those with the bits that were chosen.
    """
    states = None
    if choices is not None:
        keys = Keys(at_widths(config, {}), run.model, run.grid, run.guidance_scale)
        states = stage("calibration_set", make_calibration_set, run, config.calibration, keys.calibration(1), images)
        error = stage("sensitivity", measure_alone, run, config, choices, states)
        config = stage("allocation", best_choice, run, config, choices, error, states)
    keys, plan = Keys(config, run.model, run.grid, run.guidance_scale), Plan.of(config, run.grid)
    return _made(run, plan, config, keys, stage, images, states), config


def _made(
    run: Run, plan: Plan, config: ExperimentConfig, keys: Keys, stage: Stages, images: Any,
    states: CalibrationSet | None,
) -> QuantizedModel:
    calibration, evaluations, previous = config.calibration, 0, None
    for n in range(1, calibration.rounds + 1):
        suffix, which = ("", "") if n == 1 else (f"_{n}", f" of the quantized model, round {n}")
        if n > 1 or states is None:
            states = stage(f"calibration_set{suffix}", make_calibration_set, run, calibration, keys.calibration(n),
                           images, previous, which)
        quantized = stage(f"quantize{suffix}", quantize_model, run, plan, keys, states, n)
        previous = quantized
        evaluations += int(states.evaluations.sum())
    key = keys.quantization()
    model = stage("reconstruct", reconstruct, run, plan, config.reconstruction, key, quantized, states)
    model = stage("proof", prove, run, model, states)
    model = stage("bit_schedule", schedule_bits, run, plan, config.correction, key, model)
    model = stage("noise_statistics", fit_correction, run, plan, config.correction, keys, model)
    return executed_by(replace(model, recipe=recipe(config, run.model, evaluations)), config.runtime, run)
