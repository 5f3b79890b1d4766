"""One experiment: model -> calibration set -> quantized model -> images -> scores -> results, pictures, W&B."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ptq_exp.deploy.artifact import Artifact
from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.diffusion import check_network
from ptq_exp.errors import ConfigError
from ptq_exp.evaluation.gate import judged
from ptq_exp.experiment.analyse import analyse
from ptq_exp.experiment.budget import check_budget, check_feasible
from ptq_exp.experiment.choices import Choices
from ptq_exp.experiment.correction import check_statistics
from ptq_exp.experiment.execution import executed_by, measure_execution, watched_denoiser
from ptq_exp.experiment.features import reference_features
from ptq_exp.experiment.forecast import Forecast, forecast_run, refuse_copy
from ptq_exp.experiment.freed_memory import keep_freed_memory
from ptq_exp.experiment.images import full_precision_images, quantized_images
from ptq_exp.experiment.inputs import checked_images
from ptq_exp.experiment.keys import Keys
from ptq_exp.experiment.making import make_quantized
from ptq_exp.experiment.noise import eps_error
from ptq_exp.experiment.noise_record import eps_errors, noise_record
from ptq_exp.experiment.outcome import Outcome, look_at, quantization_entry, say, tracked_run
from ptq_exp.experiment.pairs import PairScorer
from ptq_exp.experiment.plan import Plan
from ptq_exp.experiment.run import Run, open_saved
from ptq_exp.experiment.saved import load_saved
from ptq_exp.experiment.schedule import schedule_record, title_of
from ptq_exp.experiment.scores import Scored, Scorer
from ptq_exp.experiment.stage import Record, Stages
from ptq_exp.experiment.threads import Watch, choose_threads
from ptq_exp.experiment.writer import RunWriter
from ptq_exp.results.environment import environment, run_command
from ptq_exp.results.record import SAMPLES, Results
from ptq_exp.results.sinks import spoils_nothing
from ptq_exp.settings.schema import FULL_PRECISION, ExperimentConfig
from ptq_exp.storage.atomic import file_digest

log = logging.getLogger("ptq_exp")
SHORT_RUN = 60.0
"""Seconds of network evaluations below which a run is not forecast, as that would be much of what it takes."""


def run_experiment(config: ExperimentConfig, folder: Path, fresh_since: float | None = None) -> dict:
    """Run one experiment and leave its results in `folder`.

    Writes results.json (after every stage), samples.npz, grid.png, report.html, quantization.json, the quantized
    model, the W&B run and, where there is a bit schedule, a correction or an analysis, their files and pictures. Where
    `config.quantized` names a saved model, that one is evaluated instead.

    Args:
        fresh_since: with cache=refresh, the age from which on shared artefacts are not computed anew; None = now.

    Returns:
        The content of results.json.

    Raises:
        PTQError: something the user can mend; results.json says what, too.
    """
    log.info("%s: seed %d, results in %s", config.name, config.seed, folder)
    with (
        Results(folder / "results.json", name=config.name, seed=config.seed, config=asdict(config)) as results,
        tracked_run(config, folder) as wandb_sink,
    ):
        saved = open_saved(config)
        run = _run_of(config, saved, fresh_since)
        keys = Keys(config, run.model, run.grid, run.guidance_scale, saved)
        writer = RunWriter(folder, results)
        stage = Stages(run.cache, writer)
        plan = Plan.of(config, run.grid) if config.bits.name != FULL_PRECISION and saved is None else None
        _begin(results, run, config, folder)
        images, choices = (None, None) if plan is None else _checked(run, plan, config, keys, writer)
        forecast = forecast_run(run, plan, config, keys, folder, SHORT_RUN) if saved is None else None
        if forecast is not None:
            results.update("forecast", forecast=forecast.to_dict())
        quantized = stage("load_quantized", load_saved, run, saved, config.quantized) if saved else None
        scorer = Scorer(run, config.evaluation, stage("reference", reference_features, run, config.evaluation))
        pair_scorer = None if plan is saved is None else PairScorer(run, config.evaluation)
        fp_images = stage("fp32_images", full_precision_images, run, config.evaluation, keys.images())
        fp = stage("fp32_scores", scorer.full_precision, fp_images, keys.images())
        results.update("fp32", fp32=fp.scores, real=scorer.real_data,
                       metric_spec=scorer.metric_spec() | (pair_scorer.spec() if pair_scorer else {}))
        if plan is not None:
            quantized, config = make_quantized(run, config, stage, images, choices)
            keys = Keys(config, run.model, run.grid, run.guidance_scale)
        elif quantized is not None:
            quantized = executed_by(quantized, config.runtime, run)
            writer.write("load_quantized", schedule_record(quantized, config.bits.name))
        if quantized is None:
            outcome = _of_full_precision(run, writer, fp_images, fp)
        else:
            outcome = _evaluated(run, config, keys, stage, writer, quantized, scorer, pair_scorer, fp_images, fp)
        _finish(results, config, outcome, forecast)
        if quantized is not None and config.runtime.engine is not None and config.runtime.measure:
            _measure_engine(results, stage, run, config, quantized, outcome)
        look_at(outcome, results.values, config, folder, writer.pictures, wandb_sink)
    say(outcome, results.values, folder)
    return results.values


def _run_of(config: ExperimentConfig, saved: Artifact | None = None, fresh_since: float | None = None) -> Run:
    """Build the objects of the run, and choose its threads by what is free meanwhile."""
    watch = Watch.begin()
    run = Run.of(config, saved, fresh_since)
    choose_threads(config.trainer, run.device, watch)
    if run.device.type == "cpu" and run.max_memory is None:
        keep_freed_memory()
    return run


def forecast_experiment(config: ExperimentConfig, folder: Path) -> Forecast | None:
    """Forecast an experiment that would leave its results in `folder`, and run nothing of it.

    Returns:
        None where no forecast can be made; the log says why.

    Raises:
        PTQError: the experiment cannot be run, or its memory or disk do not suffice.
    """
    if config.quantized is not None:
        raise ConfigError("forecast=true: only what makes a quantized model is forecast, not quantized=PATH")
    run = _run_of(config)
    keys = Keys(config, run.model, run.grid, run.guidance_scale)
    plan = Plan.of(config, run.grid) if config.bits.name != FULL_PRECISION else None
    check_network(run.model, run.grid, config.seed, run.device, config.model.checkpoint)
    if plan is not None:
        refuse_copy(run)
        check_feasible(run, plan, config)
    return forecast_run(run, plan, config, keys, folder)


def _begin(results: Results, run: Run, config: ExperimentConfig, folder: Path) -> None:
    """Record where the run takes place and how to repeat it, and try the network."""
    # the same path may hold other weights later
    weights = {"weights": {"model": run.model.digest[:12]}} if config.model.checkpoint is not None else {}
    results.update("start", environment=environment(), command=run_command(folder), **weights)
    check_network(run.model, run.grid, config.seed, run.device, config.model.checkpoint)


def _finish(results: Results, config: ExperimentConfig, outcome: Outcome, forecast: Forecast | None) -> None:
    """Record the scores, whether they pass the gate, and how near the forecast was."""
    if forecast is not None:
        results.update(results.values["stage"], forecast=forecast.beside(results.values["seconds"]))
    gate = config.evaluation.gate
    results.finish(metrics=outcome.metrics, **({"gate": judged(outcome.metrics, gate)} if gate else {}))


def _measure_engine(
    results: Results, stage: Stages, run: Run, config: ExperimentConfig, quantized: QuantizedModel,
    outcome: Outcome,
) -> None:
    """Time the engine and compare it with the simulation; what goes wrong here is a warning."""
    with spoils_nothing("the section runtime of results.json", "images and scores are there"):
        stage("runtime", measure_execution, run, config, quantized, outcome.watched, outcome.images)
    results.finish()


def _checked(
    run: Run, plan: Plan, config: ExperimentConfig, keys: Keys, writer: RunWriter
) -> tuple[Any, Choices | None]:
    """Raise what would end the run hours later; returns the real images that calibration starts from, and choices.

    Of both there may be none: choices are those of bits within a budget.
    """
    refuse_copy(run)
    check_statistics(run, plan, config.correction, keys)
    images = checked_images(run, config)
    report, budget = check_feasible(run, plan, config)
    if budget.numbers:
        writer.write("budget", budget)
    check_budget(config.bits.min_bops_ratio, report)
    return images, Choices.of(run, config)


def _of_full_precision(run: Run, writer: RunWriter, images: np.ndarray, scored: Scored) -> Outcome:
    """Return the outcome of a run that quantizes nothing."""
    labels = run.model.labels(range(len(images)), run.seed)
    writer.samples(images, None if labels is None else labels.numpy())
    return Outcome(images, images, dict(scored.scores))


def _evaluated(
    run: Run, config: ExperimentConfig, keys: Keys, stage: Stages, writer: RunWriter, quantized: QuantizedModel,
    scorer: Scorer, pair_scorer: PairScorer, fp_images: np.ndarray, fp: Scored,
) -> Outcome:
    """Measure the eps errors of the quantized model, save it, draw and score its images."""
    name, title = config.bits.name, title_of(quantized, config.bits.name)
    key = keys.estimates(quantized.schedule, quantized.statistics is not None)
    error = stage("eps_error", eps_error, run, config.evaluation, key, quantized)
    numbers = {"quantization": quantization_entry(quantized.report), "evaluations": quantized.recipe["evaluations"]}
    transforms = {"transforms": [done.to_dict() for done in quantized.transforms]} if quantized.transforms else {}
    writer.write("quantize", Record(numbers | transforms))
    writer.write("noise_statistics", noise_record(quantized, error, title))
    saved = None
    if config.save_quantized and keys.saved is None:
        saved = stage("save_quantized", writer.quantized, quantized)
    else:
        writer.layers(quantized)
    if config.analysis.active:
        stage("analysis", analyse, run, config.analysis, keys, quantized)
    path, watched = writer.folder / SAMPLES, watched_denoiser(quantized, config)
    drawn = keys.quantized_images(quantized.schedule, quantized.statistics is not None, run.device)
    images = stage("quantized_images", quantized_images, run, config.evaluation, drawn, quantized,
                   f"{name.upper()} images", path, watched)
    scored = stage("scores", scorer, images, f"{name.upper()} features", {"images": file_digest(path)})
    of_pairs = stage("pairs", pair_scorer, images, fp_images, scored, fp, scorer)
    return Outcome(images, fp_images, scored.scores | of_pairs | eps_errors(error), quantized.report, saved, watched)
