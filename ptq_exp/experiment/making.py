"""From a calibration set to the quantized model: the half of an experiment that scripts need, too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ptq_exp.deploy.quantized_model import QuantizedModel
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
    run: Run, plan: Plan, config: ExperimentConfig, keys: Keys, stage: Stages, images: Any
) -> QuantizedModel:
    """Make the quantized model: calibration set, ranges, roundings, bit schedule, correction."""
    calibration, evaluations, previous, states = config.calibration, 0, None, None
    for n in range(1, calibration.rounds + 1):
        suffix, which = ("", "") if n == 1 else (f"_{n}", f" of the quantized model, round {n}")
        states = stage(f"calibration_set{suffix}", make_calibration_set, run, calibration, keys.calibration(n), images,
                       previous, which)
        quantized = stage(f"quantize{suffix}", quantize_model, run, plan, keys, states, n)
        previous = quantized
        evaluations += int(states.evaluations.sum())
    key = keys.quantization()
    model = stage("reconstruct", reconstruct, run, plan, config.reconstruction, key, quantized, states)
    model = stage("proof", prove, run, model, states)
    model = stage("bit_schedule", schedule_bits, run, plan, config.correction, key, model)
    model = stage("noise_statistics", fit_correction, run, plan, config.correction, keys, model)
    return executed_by(replace(model, recipe=recipe(config, run.model, evaluations)), config.runtime, run)
