"""One experiment: model -> calibration set -> quantized twin -> images -> scores -> results, pictures, W&B."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from ptq_exp import stages
from ptq_exp.config import FULL_PRECISION, ExperimentConfig
from ptq_exp.evaluation.features import extract_features
from ptq_exp.evaluation.images import mean_psnr
from ptq_exp.evaluation.reference import FeatureStatistics, half_split_fid, score
from ptq_exp.quantization import Report, ranges
from ptq_exp.tracking import wandb_run
from ptq_exp.tracking.pictures import save_grid
from ptq_exp.tracking.results import Results, write_json, write_samples

log = stages.log


def run_experiment(config: ExperimentConfig, folder: Path) -> dict:
    """Run one experiment and leave its results in `folder`.

    Writes results.json (after every stage), samples.npz, grid.png, quantization.json and the W&B run.

    Returns:
        The content of results.json.

    Raises:
        PTQError: something the user can mend; results.json says what, too.
    """
    log.info("%s: seed %d, results in %s", config.name, config.seed, folder)
    with (
        Results(folder / "results.json", name=config.name, seed=config.seed, config=asdict(config)) as results,
        _tracked(config, folder) as logger,
    ):
        clock = _Clock(results)
        setup = stages.Setup.of(config)
        reference = clock("reference", stages.reference_features, setup)
        fp_images = images = clock("fp32_images", stages.full_precision_images, setup)
        fp_scores = _score(setup, fp_images, reference)
        results.update("fp32", fp32=fp_scores, real=_real_data(reference), metric_spec=_metric_spec(setup, reference))
        metrics, report = fp_scores, None
        if config.bits.name != FULL_PRECISION:
            calibration_set = clock("calibration_set", stages.make_calibration_set, setup)
            quantized, report = clock("quantize", stages.quantize_model, setup, calibration_set)
            write_json(folder / "quantization.json", report.to_dict() | {"quantizers": ranges(quantized)})
            results.update("quantize", quantization=_account(report), evaluations=calibration_set.evaluations)
            eps_error = clock("eps_error", stages.eps_error, setup, quantized)
            images = clock("quantized_images", stages.quantized_images, setup, quantized)
            metrics = _score(setup, images, reference)
            metrics |= _paired(metrics, fp_scores, results.values["real"]["half_split_fid"])
            metrics |= {"psnr": mean_psnr(fp_images, images), "eps_error": float(np.mean(eps_error))}
            results.update("eps_error", eps_error_per_step=eps_error)
        write_samples(folder / "samples.npz", images)
        _picture(config, folder, fp_images, images)
        results.finish(metrics=metrics)
        _log_to_wandb(logger, folder, results.values, report)
    log.info("\n%s", summary(results.values, report))
    log.info("\nresults.json, samples.npz, grid.png%s in %s", ", quantization.json" if report else "", folder)
    return results.values


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
    """Runs a stage and records its wall seconds in the results."""

    def __init__(self, results: Results) -> None:
        self.results = results

    def __call__(self, stage: str, function, *args):
        started = time.perf_counter()
        value = function(*args)
        self.results.update(stage, seconds={stage: round(time.perf_counter() - started, 2)})
        return value


def _score(setup: stages.Setup, images: np.ndarray, reference: FeatureStatistics) -> dict[str, float]:
    return score(extract_features(setup.extractor, images), reference)


def _real_data(reference: FeatureStatistics) -> dict[str, float]:
    """What the real images score, and the unit of the paired increase."""
    return {"is": score(reference, reference)["is"], "half_split_fid": half_split_fid(reference.pooled)}


def _paired(metrics: dict[str, float], fp_scores: dict[str, float], unit: float) -> dict[str, float]:
    """FID increase over the full-precision twin of the same seeds, absolute and in units of `unit`."""
    increase = metrics["fid"] - fp_scores["fid"]
    return {"fid_increase": increase, "fid_increase_units": increase / unit}


def _metric_spec(setup: stages.Setup, reference: FeatureStatistics) -> dict:
    """The five things that identify a number."""
    return {
        "extractor": setup.extractor.name,
        "preprocessing": setup.extractor.preprocessing,
        "reference": reference.name,
        "n_samples": setup.config.evaluation.n_samples,
        "seed": setup.config.seed,
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


def _log_to_wandb(logger, folder: Path, values: dict, report: Report | None) -> None:
    for step, error in enumerate(values.get("eps_error_per_step", [])):
        wandb_run.log_metrics(logger, {"eps_error_of_step": error, "sampling_step": step})
    numbers = dict(values["metrics"]) | {"calibration/evaluations": values.get("evaluations", 0)}
    numbers |= {f"fp32/{key}": value for key, value in values["fp32"].items()}
    if report is not None:
        account = _account(report)
        numbers |= {key: account[key] for key in ("coverage_conv_linear", "bops_ratio", "bops_ratio_everything")}
        wandb_run.log_table(logger, "layers", report.table())
    wandb_run.log_metrics(logger, numbers)
    wandb_run.log_image(logger, "grid", folder / "grid.png", caption="full precision over quantized, same seeds")


def summary(values: dict, report: Report | None) -> str:
    """The table that ends a run: real data, full precision, quantized."""
    spec, unit = values["metric_spec"], values["real"]["half_split_fid"]
    rows = {"real data": {"IS": values["real"]["is"]}, "FP32": _columns(values["fp32"])}
    lines = []
    if report is not None:
        rows[values["config"]["bits"]["name"].upper()] = _columns(values["metrics"])
        lines += [report.summary(), ""]
    table = pd.DataFrame(rows).T.reindex(columns=["IS", "FID", "sFID", "FID increase", "PSNR dB", "eps error"])
    lines.append(table.dropna(axis=1, how="all").to_string(float_format="{:.4g}".format, na_rep="-"))
    lines.append(
        f"{spec['n_samples']} images, seed {spec['seed']}, extractor {spec['extractor']} ({spec['preprocessing']}), "
        f"reference {spec['reference']};\nFID increase over FP32 of the same seeds in units of the FID between two "
        f"random halves of the real data ({unit:.4g})"
    )
    return "\n".join(lines)


def _columns(scores: dict[str, float]) -> dict[str, float]:
    titles = {"is": "IS", "fid": "FID", "sfid": "sFID", "fid_increase_units": "FID increase", "psnr": "PSNR dB",
              "eps_error": "eps error"}  # fmt: skip
    return {title: scores[key] for key, title in titles.items() if key in scores}
