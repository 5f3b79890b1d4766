"""One experiment: model -> calibration set -> quantized twin -> images -> scores -> results, pictures, W&B."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ptq_exp.deploy.artifact import SUBFOLDER
from ptq_exp.deploy.card import write_card
from ptq_exp.evaluation.images import mean_psnr
from ptq_exp.experiment import noise as noise_stages
from ptq_exp.experiment import stages
from ptq_exp.experiment.analyse import analyse
from ptq_exp.experiment.budget import check_feasible
from ptq_exp.experiment.inputs import check_inputs
from ptq_exp.experiment.noise_record import eps_errors, noise_account, write_account
from ptq_exp.experiment.ranges import prove
from ptq_exp.experiment.reconstruct import calibration_seconds, reconstruct, reconstruction_account
from ptq_exp.experiment.run import Setup
from ptq_exp.experiment.saved import load_twin, save_twin
from ptq_exp.experiment.scores import Scorer
from ptq_exp.experiment.twin import Twin
from ptq_exp.quantization import Report
from ptq_exp.reports.grid import save_grid
from ptq_exp.reports.html import write_run_report
from ptq_exp.reports.summary import summary
from ptq_exp.results import wandb as wandb_run
from ptq_exp.results.environment import environment, run_command
from ptq_exp.results.record import Results, write_samples
from ptq_exp.results.sinks import spoils_nothing
from ptq_exp.results.tracked import Tracked, tracked
from ptq_exp.settings.schema import FULL_PRECISION, ExperimentConfig
from ptq_exp.storage.atomic import file_digest
from ptq_exp.storage.in_use import using

log = stages.log


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
        using(config.cache_dir),
        _tracked(config, folder) as wandb_sink,
    ):
        clock = _Clock(results)
        setup = clock.setup = Setup.of(config, fresh_since)
        results.update("start", environment=environment(), command=run_command(folder))
        check_inputs(setup)
        check_feasible(setup, results)
        loaded = _loaded_twin(setup, clock) if setup.artifact else None
        reference = clock("reference", stages.reference_features, setup) if setup.extractor else None
        scorer = Scorer(setup, reference)
        fp_images = clock("fp32_images", stages.full_precision_images, setup)
        fp_scores = clock("fp32_scores", scorer.full_precision, fp_images)
        results.update("fp32", fp32=fp_scores, real=scorer.real_data, metric_spec=scorer.metric_spec())
        if config.bits.name == FULL_PRECISION:
            made = _full_precision(setup, fp_images, fp_scores, folder)
        else:
            made = _quantized(setup, clock, loaded or _new_twin(setup, clock), scorer, fp_images, fp_scores, folder)
        results.finish(metrics=made.metrics)
        _leave(config, folder, results.values, made, fp_images)
        wandb_sink.record(_for_wandb(folder, results.values, made.report, made.pictures))
    with spoils_nothing("the table above", "results.json has its numbers"):
        log.info("\n%s", summary(results.values, made.report and made.report.summary()))
    log.info("\n%s in %s", ", ".join(_left_in(folder)), folder)
    return results.values


@dataclass
class _Made:
    """What a run made.

    Attributes:
        images: uint8 NHWC, also in samples.npz.
        metrics: their scores.
        report: account of the quantized network's layers; None in full precision.
        pictures: names of the pictures for W&B.
        saved: description of the saved model.
    """

    images: np.ndarray
    metrics: dict[str, float]
    report: Report | None = None
    pictures: list[str] = field(default_factory=list)
    saved: dict | None = None


def _full_precision(setup: Setup, images: np.ndarray, scores: dict[str, float], folder: Path) -> _Made:
    labels = setup.model.labels(range(len(images)), setup.config.seed)
    write_samples(folder / "samples.npz", images, None if labels is None else labels.numpy())
    return _Made(images, dict(scores))


def _quantized(
    setup: Setup, clock: _Clock, quantized: tuple[Twin, int], scorer: Scorer, fp_images: np.ndarray,
    fp_scores: dict[str, float], folder: Path,
) -> _Made:  # fmt: skip
    """Measure the eps errors of the `quantized` twin, draw and score."""
    config, results = setup.config, clock.results
    twin, evaluations = quantized
    error = clock("eps_error", noise_stages.eps_error, setup, twin)
    transforms = {"transforms": [made.to_dict() for made in twin.transforms]} if twin.transforms else {}
    results.update("quantize", quantization=_account(twin.report), evaluations=evaluations, **transforms)
    results.update("reconstruct", **reconstruction_account(twin, folder))
    results.update("noise_statistics", **noise_account(setup, twin, error))
    pictures, saved = write_account(setup, twin, error, folder), None
    if config.save_quantized and not setup.artifact:
        saved = clock("save_quantized", save_twin, setup, twin, evaluations, folder)
    if config.analysis.active:
        results.update("analysis", analysis=clock("analysis", analyse, setup, twin, folder))
    samples = folder / "samples.npz"
    images = clock("quantized_images", stages.quantized_images, setup, twin, samples)
    metrics = clock("scores", scorer, images, f"{config.bits.name.upper()} features", {"images": file_digest(samples)})
    metrics |= scorer.paired(metrics, fp_scores) | {"psnr": mean_psnr(fp_images, images)} | eps_errors(error)
    return _Made(images, metrics, twin.report, pictures, saved)


def _new_twin(setup: Setup, clock: _Clock) -> tuple[Twin, int]:
    """The quantized twin, made here, and the network evaluations that its calibration took."""
    calibration_set = clock("calibration_set", stages.make_calibration_set, setup)
    twin = clock("quantize", stages.quantize_model, setup, calibration_set)
    evaluations = int(calibration_set.evaluations.sum())
    for n in range(2, setup.config.calibration.rounds + 1):
        calibration_set = clock(f"calibration_set_{n}", stages.make_calibration_set, setup, twin, n)
        twin = clock(f"quantize_{n}", stages.quantize_model, setup, calibration_set, n)
        evaluations += int(calibration_set.evaluations.sum())
    twin = clock("reconstruct", reconstruct, setup, twin, calibration_set)
    clock.results.update("reconstruct", calibration_seconds=calibration_seconds(setup, twin))
    twin = clock("proof", prove, setup, twin, calibration_set)
    twin = clock("bit_schedule", noise_stages.schedule_bits, setup, twin)
    twin = clock("noise_statistics", noise_stages.fit_correction, setup, twin)
    return twin, evaluations


def _loaded_twin(setup: Setup, clock: _Clock) -> tuple[Twin, int]:
    """The saved quantized twin, and the network evaluations that its calibration had taken."""
    return clock("load_quantized", load_twin, setup), setup.artifact.description["evaluations"]


def _leave(config: ExperimentConfig, folder: Path, values: dict, made: _Made, fp_images: np.ndarray) -> None:
    """What is made of the results to look at: picture, model card, report."""
    with spoils_nothing("grid.png", "the images are in samples.npz"):
        _picture(config, folder, fp_images, made.images)
    if made.saved is not None:
        with spoils_nothing(f"{SUBFOLDER}/README.md", "the saved model is whole, results.json says how it was made"):
            write_card(folder / SUBFOLDER, made.saved, values, values["command"])
    with spoils_nothing("report.html", f"python -m ptq_exp report {shlex.quote(str(folder))} makes it"):
        write_run_report(folder)


def _tracked(config: ExperimentConfig, folder: Path) -> AbstractContextManager[Tracked]:
    """The W&B run of the experiment."""
    settings = config.logger
    tags = [config.model.name, config.calibration.name, config.metric.name, config.bits.name, *settings.tags]
    return tracked(
        settings.mode, folder, project=settings.project, entity=settings.entity, name=f"{config.name}-s{config.seed}",
        group=settings.group or config.name, tags=list(dict.fromkeys(tags)), config=asdict(config),
    )  # fmt: skip


class _Clock:
    """Runs a stage and records its wall seconds, and what the cache of `setup` had, in the results."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.setup: Setup | None = None

    def __call__(self, stage: str, function, *args):
        started = time.perf_counter()
        value = function(*args)
        seconds = {stage: round(time.perf_counter() - started, 2)}
        self.results.update(stage, seconds=seconds, cache=self.setup.cache.counts())
        return value


def _account(report: Report) -> dict:
    """Coverage, size and bit operations for results.json."""
    totals = report.totals
    not_counted = {"not_counted": list(report.not_counted)} if report.not_counted else {}
    return totals | not_counted | {
        "coverage_conv_linear": totals["coverage"]["conv_linear"],
        "bops_ratio": totals["bops_reduction"]["conv_linear"],
        "bops_ratio_everything": totals["bops_reduction"]["everything"],
    }


def _picture(config: ExperimentConfig, folder: Path, fp_images: np.ndarray, images: np.ndarray) -> None:
    n = min(config.evaluation.grid_images, len(images))
    save_grid(folder / "grid.png", fp_images[:n], images[:n], labels=("FP32", config.bits.name.upper()))


def _for_wandb(
    folder: Path, values: dict, report: Report | None, pictures: list[str]
) -> dict[str, Callable[[Any], object]]:
    """What W&B is told of a run: each item with the function that gives it to the logger."""

    def errors_per_step(logger: Any) -> None:
        for step, error in enumerate(values.get("eps_error_per_step", [])):
            row = {"eps_error_of_step": error, "sampling_step": step}
            for name in ("eps_error_uncorrected", "fixed_pattern_share", "fixed_pattern_share_uncorrected"):
                if per_step := values.get(f"{name}_per_step"):
                    row[f"{name}_of_step"] = per_step[step]
            wandb_run.log_metrics(logger, row)

    numbers = dict(values["metrics"]) | {"calibration/evaluations": values.get("evaluations", 0)}
    numbers |= {f"fp32/{key}": value for key, value in values["fp32"].items()}
    if report is not None:
        account = _account(report)
        numbers |= {key: account[key] for key in ("coverage_conv_linear", "bops_ratio", "bops_ratio_everything")}
    sections = ("metric_spec", "quantization", "real")  # with them a table can be made from the W&B run alone
    summed = {key: values[key] for key in sections if key in values}
    items = {
        "the errors per step": errors_per_step,
        "the scores": lambda logger: wandb_run.log_metrics(logger, numbers),
        "the summary": lambda logger: wandb_run.log_summary(logger, summed),
        "grid.png": lambda logger: wandb_run.log_image(
            logger, "grid", folder / "grid.png", caption="full precision over quantized, same seeds"),
    }  # fmt: skip
    if report is not None:
        items["the table of layers"] = lambda logger: wandb_run.log_table(logger, "layers", report.table())
    for name in pictures:
        # a name of its own: a metric is called eps_error, too
        picture = f"pictures/{Path(name).stem}"
        items[name] = partial(wandb_run.log_image, key=picture, path=folder / name)
    return items


def _left_in(folder: Path) -> list[str]:
    """The files of a finished run, the ones that people look for first."""
    names = [path.name for path in folder.iterdir() if path.suffix in (".json", ".npz", ".png", ".html")]
    return sorted(names, key=lambda name: (name != "results.json", name))
