"""Seconds of each stage, from what it evaluates and how fast that is here."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ptq_exp.experiment.forecast.blocks import reconstruction_seconds
from ptq_exp.experiment.forecast.engine import measuring_seconds
from ptq_exp.experiment.forecast.pairs import compared_seconds
from ptq_exp.experiment.forecast.speeds import Speeds
from ptq_exp.experiment.forecast.work import Work
from ptq_exp.pipelines import PipelineModel
from ptq_exp.settings.build import build
from ptq_exp.settings.schema import ExperimentConfig

_TRACES = {"quantize": 2, "reconstruct": 4}
"""Evaluations of one sample that find the order of blocks, beside those that place quantizers."""


def stage_seconds(
    speeds: Speeds, config: ExperimentConfig, work: Work, reused: set[str]
) -> dict[str, float | None]:
    """Map each stage to its seconds; None where nobody knows.

    Args:
        reused: stages whose result lies in the cache.
    """
    seconds: dict[str, float | None] = {}
    for stage, evaluations in work.items():
        if stage in reused:
            seconds[stage] = 0.0
            continue
        took = sum(speeds.of(e.network).fixed * e.times + speeds.of(e.network).each * e.samples for e in evaluations)
        took += _beside(speeds, config, stage)
        if stage.startswith("quantize") and stage != "quantized_images":
            batch, states = evaluations[0].largest, int(evaluations[0].samples)
            fitted = (transform.seconds(batch, states) for transform in speeds.placed.transforms)
            took += speeds.placed.weights + speeds.placed.ranges + sum(fitted) + _traced(speeds, "quantize")
        seconds[stage] = took
    if speeds.plan is not None:
        states, model = config.calibration.n_samples, speeds.run.model
        if isinstance(model, PipelineModel):
            states *= config.calibration.steps_per_sample * model.copies
        skipped = "reconstruct" in reused or not config.reconstruction.active
        seconds["reconstruct"] = 0.0 if skipped else (
            reconstruction_seconds(speeds, config.reconstruction, states) + _traced(speeds, "reconstruct")
        )
        if speeds.run.blockwise and config.save_quantized:
            seconds["save_quantized"] = speeds.saved
        seconds.setdefault("bit_schedule", 0.0)
        seconds |= {"analysis": None} if config.analysis.active else {}
        seconds |= _of_engine(speeds, config, seconds, reused)
    return seconds | _of_scores(speeds, config, reused)


def _beside(speeds: Speeds, config: ExperimentConfig, stage: str) -> float:
    """Return the seconds of what a stage computes beside the network while it samples: the first stage.

    Of a pipeline it is all that is not the network, and every sampling comes to its end.
    """
    evaluation = config.evaluation
    if stage.endswith("_images"):
        batch = evaluation.batch_size
        return speeds.decoded.seconds(batch, math.ceil(evaluation.n_samples / batch))
    if not isinstance(speeds.run.model, PipelineModel) or stage.startswith("quantize"):
        return 0.0
    if stage.startswith("calibration_set"):
        n, batch = config.calibration.n_samples, config.calibration.batch_size
    elif stage in ("bit_schedule", "noise_statistics"):
        n, batch = config.correction.n_samples, config.correction.batch_size
    else:
        n, batch = evaluation.eps_error_samples, evaluation.batch_size
    return speeds.decoded.seconds(min(n, batch), math.ceil(n / batch))


def _traced(speeds: Speeds, stage: str) -> float:
    """Return the seconds of what a stage does with a network in files before its first block; others take few."""
    if not speeds.run.blockwise:
        return 0.0
    placing = speeds.placed.placing if stage == "quantize" else 0.0
    return placing + _TRACES[stage] * speeds.full.seconds(1)


def _of_engine(
    speeds: Speeds, config: ExperimentConfig, seconds: Mapping[str, float | None], reused: set[str]
) -> dict[str, float | None]:
    """Return the stage that measures an engine; where it draws, too, it is compiled in the first stage that draws."""
    runtime = config.runtime
    if runtime.engine is None:
        return {}
    if not speeds.compiles:
        return {"runtime": None} if runtime.measure else {}
    draws = runtime.name != "simulate"
    found: dict[str, float | None] = {}
    if draws:  # it is compiled for each size of a batch
        evaluation = config.evaluation
        if "eps_error" not in reused:
            found["eps_error"] = (seconds["eps_error"] or 0.0) + speeds.engine.compiled
        if "quantized_images" not in reused and evaluation.eps_error_samples < evaluation.batch_size:
            found["quantized_images"] = (seconds["quantized_images"] or 0.0) + speeds.engine.compiled
    if runtime.measure:
        found["runtime"] = measuring_seconds(
            speeds.engine, speeds.full, speeds.quantized, runtime, config.evaluation.batch_size, len(speeds.run.grid)
        )
        if runtime.measure_memory:
            found["runtime"] = None  # processes that start and end
    return found


def _of_scores(speeds: Speeds, config: ExperimentConfig, reused: set[str]) -> dict[str, float | None]:
    run, evaluation, n = speeds.run, config.evaluation, config.evaluation.n_samples
    if run.extractor is None:
        return {}
    real = None
    if isinstance(evaluation.reference, dict):
        real = len(build(evaluation.reference, "evaluation.reference"))
    drawn = speeds.scoring.features.seconds(64, n / 64)
    scored = speeds.scoring.scored(n, real or 0) if evaluation.reference is not None else 0.0
    seconds: dict[str, float | None] = {
        "fp32_scores": scored + (0.0 if "fp32_scores" in reused else drawn),
        "reference": 0.0 if "reference" in reused or evaluation.reference is None else
        None if real is None else speeds.scoring.features.seconds(64, real / 64),
    }
    if speeds.plan is not None:
        seconds["scores"] = scored + drawn
        seconds["pairs"] = compared_seconds(run, evaluation, n) + speeds.scoring.resampled(n, evaluation.fid_resamples)
    return seconds
