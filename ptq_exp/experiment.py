"""One experiment: model -> calibration set -> quantized twin -> images -> scores -> results, pictures, W&B."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np

from ptq_exp import noise_stages, stages
from ptq_exp.analysis_stage import analyse
from ptq_exp.artifact import SUBFOLDER
from ptq_exp.budget import check_budget
from ptq_exp.evaluation import half_split_fid, inception_score, score
from ptq_exp.evaluation.images import mean_psnr
from ptq_exp.files import file_digest
from ptq_exp.model_card import write_card
from ptq_exp.noise_account import eps_errors, noise_account, write_account
from ptq_exp.quantization import Report
from ptq_exp.quantized import load_twin, save_twin
from ptq_exp.reconstruction_stage import reconstruct, reconstruction_account
from ptq_exp.reporting import write_run_report
from ptq_exp.schema import FULL_PRECISION, ExperimentConfig
from ptq_exp.setup import Setup
from ptq_exp.summary import summary
from ptq_exp.tracking import wandb_run
from ptq_exp.tracking.environment import environment, run_command
from ptq_exp.tracking.in_use import using
from ptq_exp.tracking.pictures import save_grid
from ptq_exp.tracking.results import Results, write_samples
from ptq_exp.twin import Twin

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
        _tracked(config, folder) as logger,
    ):
        clock = _Clock(results)
        setup = clock.setup = Setup.of(config, fresh_since)
        results.update("start", environment=environment(), command=run_command(folder))
        check_budget(setup, results)
        reference = clock("reference", stages.reference_features, setup) if setup.extractor else None
        scorer = _Scorer(setup, reference)
        fp_images = images = clock("fp32_images", stages.full_precision_images, setup)
        fp_scores = clock("fp32_scores", scorer.full_precision, fp_images)
        results.update("fp32", fp32=fp_scores, real=scorer.real_data, metric_spec=scorer.metric_spec())
        metrics, report, pictures, saved = dict(fp_scores), None, [], None
        samples = folder / "samples.npz"
        if config.bits.name == FULL_PRECISION:
            labels = setup.model.labels(range(len(images)), config.seed)
            write_samples(samples, images, None if labels is None else labels.numpy())
        else:
            twin, evaluations = _loaded(setup, clock) if setup.artifact else _quantized(setup, clock)
            report = twin.report
            error = clock("eps_error", noise_stages.eps_error, setup, twin)
            smoothed = {"smoothed": twin.smoothed} if twin.smoothed else {}
            results.update("quantize", quantization=_account(report), evaluations=evaluations, **smoothed)
            results.update("reconstruct", **reconstruction_account(twin, folder))
            results.update("noise_statistics", **noise_account(setup, twin, error))
            pictures = write_account(setup, twin, error, folder)
            if config.save_quantized and not setup.artifact:
                saved = clock("save_quantized", save_twin, setup, twin, evaluations, folder)
            if config.analysis.active:
                results.update("analysis", analysis=clock("analysis", analyse, setup, twin, folder))
            images = clock("quantized_images", stages.quantized_images, setup, twin, samples)
            spec = {"images": file_digest(samples)}
            metrics = clock("scores", scorer, images, f"{config.bits.name.upper()} features", spec)
            metrics |= scorer.paired(metrics, fp_scores) | {"psnr": mean_psnr(fp_images, images)} | eps_errors(error)
        _picture(config, folder, fp_images, images)
        results.finish(metrics=metrics)
        if saved is not None:
            write_card(folder / SUBFOLDER, saved, results.values, results.values["command"])
        _report(folder)
        _log_to_wandb(logger, folder, results.values, report, pictures)
    log.info("\n%s", summary(results.values, report))
    log.info("\n%s in %s", ", ".join(_left_in(folder)), folder)
    return results.values


def _quantized(setup: Setup, clock: _Clock) -> tuple[Twin, int]:
    """The quantized twin, made here, and the network evaluations that its calibration took."""
    calibration_set = clock("calibration_set", stages.make_calibration_set, setup)
    twin = clock("quantize", stages.quantize_model, setup, calibration_set)
    evaluations = int(calibration_set.evaluations.sum())
    for n in range(2, setup.config.calibration.rounds + 1):
        calibration_set = clock(f"calibration_set_{n}", stages.make_calibration_set, setup, twin, n)
        twin = clock(f"quantize_{n}", stages.quantize_model, setup, calibration_set, n)
        evaluations += int(calibration_set.evaluations.sum())
    twin = clock("reconstruct", reconstruct, setup, twin, calibration_set)
    twin = clock("bit_schedule", noise_stages.schedule_bits, setup, twin)
    twin = clock("noise_statistics", noise_stages.fit_correction, setup, twin)
    return twin, evaluations


def _loaded(setup: Setup, clock: _Clock) -> tuple[Twin, int]:
    """The saved quantized twin, and the network evaluations that its calibration had taken."""
    return clock("load_quantized", load_twin, setup), setup.artifact.description["evaluations"]


def _report(folder: Path) -> None:
    """Write report.html; what goes wrong there is said and spoils no results."""
    try:
        write_run_report(folder)
    except Exception as error:
        log.warning("report.html was not written (%s: %s)", type(error).__name__, error)


@contextmanager
def _tracked(config: ExperimentConfig, folder: Path) -> Iterator:
    """The W&B run of the experiment, closed whatever happens; None with logger.mode=none."""
    settings = config.logger
    tags = [config.model.name, config.calibration.name, config.metric.name, config.bits.name, *settings.tags]
    logger = wandb_run.make_logger(
        settings.mode, folder, project=settings.project, entity=settings.entity, name=f"{config.name}-s{config.seed}",
        group=settings.group or config.name, tags=list(dict.fromkeys(tags)), config=asdict(config),
    )  # fmt: skip
    exit_code = 1
    try:
        yield logger
        exit_code = 0
    finally:
        wandb_run.finish(logger, exit_code)


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


class _Scorer:
    """IS, FID, sFID, precision and recall against one reference; no scores at all without an extractor."""

    def __init__(self, setup: Setup, reference: stages.Reference | None) -> None:
        self.setup, self.reference = setup, reference
        if reference is None:
            log.info("no IS, FID, sFID: evaluation=%s compares images with their full-precision twins alone; add "
                     "evaluation=adm evaluation.reference=PATH for scores", setup.config.evaluation.name)  # fmt: skip

    def __call__(self, images: np.ndarray, title: str, spec: dict) -> dict[str, float]:
        """Scores of `images`; `spec` says which they are."""
        if self.reference is None:
            return {}
        return score(stages.image_features(self.setup, images, title, spec), self.reference)

    def full_precision(self, images: np.ndarray) -> dict[str, float]:
        """Scores of the full-precision images, whose features are shared by runs."""
        if self.reference is None:
            return {}
        return score(stages.full_precision_features(self.setup, images), self.reference)

    @cached_property
    def real_data(self) -> dict[str, float]:
        """What the real images score, and the unit of the paired increase; empty where only moments are stored."""
        features = getattr(self.reference, "features", self.reference)
        if features is None:
            return {}
        return {"is": inception_score(features.probabilities), "half_split_fid": half_split_fid(features.pooled)}

    def paired(self, metrics: dict[str, float], fp_scores: dict[str, float]) -> dict[str, float]:
        """FID increase over the full-precision twin of the same seeds, absolute and in half-split units."""
        if self.reference is None:
            return {}
        increase = metrics["fid"] - fp_scores["fid"]
        unit = self.real_data.get("half_split_fid")
        return {"fid_increase": increase} | ({"fid_increase_units": increase / unit} if unit else {})

    def metric_spec(self) -> dict:
        """The five things that identify a number."""
        extractor = self.setup.extractor
        return {
            "extractor": extractor.name if extractor else "none",
            "preprocessing": extractor.preprocessing if extractor else "none",
            "reference": self.reference.name if self.reference else "none",
            "n_samples": self.setup.config.evaluation.n_samples,
            "seed": self.setup.config.seed,
        }


def _account(report: Report) -> dict:
    """Coverage, size and bit operations for results.json."""
    totals = report.totals
    return totals | {
        "coverage_conv_linear": totals["coverage"]["conv_linear"],
        "bops_ratio": totals["bops_reduction"]["conv_linear"],
        "bops_ratio_everything": totals["bops_reduction"]["everything"],
    }


def _picture(config: ExperimentConfig, folder: Path, fp_images: np.ndarray, images: np.ndarray) -> None:
    n = min(config.evaluation.grid_images, len(images))
    save_grid(folder / "grid.png", fp_images[:n], images[:n], labels=("FP32", config.bits.name.upper()))


def _log_to_wandb(logger, folder: Path, values: dict, report: Report | None, pictures: list[str]) -> None:
    for step, error in enumerate(values.get("eps_error_per_step", [])):
        row = {"eps_error_of_step": error, "sampling_step": step}
        if before := values.get("eps_error_uncorrected_per_step"):
            row["eps_error_uncorrected_of_step"] = before[step]
        wandb_run.log_metrics(logger, row)
    numbers = dict(values["metrics"]) | {"calibration/evaluations": values.get("evaluations", 0)}
    numbers |= {f"fp32/{key}": value for key, value in values["fp32"].items()}
    if report is not None:
        account = _account(report)
        numbers |= {key: account[key] for key in ("coverage_conv_linear", "bops_ratio", "bops_ratio_everything")}
        wandb_run.log_table(logger, "layers", report.table())
    wandb_run.log_metrics(logger, numbers)
    sections = ("metric_spec", "quantization", "real")  # with them a table can be made from the W&B run alone
    wandb_run.log_summary(logger, {key: values[key] for key in sections if key in values})
    wandb_run.log_image(logger, "grid", folder / "grid.png", caption="full precision over quantized, same seeds")
    for name in pictures:
        wandb_run.log_image(logger, Path(name).stem, folder / name)


def _left_in(folder: Path) -> list[str]:
    """The files of a finished run, the ones that people look for first."""
    names = [path.name for path in folder.iterdir() if path.suffix in (".json", ".npz", ".png", ".html")]
    return sorted(names, key=lambda name: (name != "results.json", name))
