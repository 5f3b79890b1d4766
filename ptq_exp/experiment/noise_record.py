"""What a run records of its quantization noise: numbers for results.json, statistics as a file, pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ptq_exp.correction import EDGES, share_of_noise
from ptq_exp.deploy.artifact import STATISTICS_FILE
from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.experiment.noise import EpsError
from ptq_exp.experiment.stage import Record
from ptq_exp.reports import figures
from ptq_exp.reports.curves import write_figure


def eps_errors(error: EpsError) -> dict[str, float]:
    """Average over steps the relative eps error and its share of a fixed pattern as sampled; see `EpsError`.

    Where there is a correction, also before it. The last step, whose error is often many times that of the others, is
    left out of `eps_error_without_last`.
    """
    found = _means("", error.after, error.share_after)
    return found | (_means("_uncorrected", error.before, error.share_before) if error.corrected else {})


def _means(suffix: str, errors: Tensor, shares: Tensor) -> dict[str, float]:
    found = {f"eps_error{suffix}": float(errors.mean())}
    if len(errors) > 1:
        found[f"eps_error{suffix}_without_last"] = float(errors[:-1].mean())
    return found | {f"fixed_pattern_share{suffix}": float(shares.mean())}


def noise_record(quantized: QuantizedModel, error: EpsError, title: str) -> Record:
    """Describe the eps errors and the correction of a quantized model, as numbers, file and pictures."""
    numbers: dict[str, Any] = {
        "eps_error_samples": error.samples,
        "fixed_pattern_share_independent": share_of_noise(error.samples),
        "eps_error_per_step": error.after.tolist(),
        "fixed_pattern_share_per_step": error.share_after.tolist(),
    }
    files = {}
    if error.corrected:
        numbers["eps_error_uncorrected_per_step"] = error.before.tolist()
        numbers["fixed_pattern_share_uncorrected_per_step"] = error.share_before.tolist()
    if quantized.statistics is not None:
        numbers["correction"] = _correction(quantized, error)
        files[STATISTICS_FILE] = quantized.statistics.save
    return Record(numbers, files, _pictures(quantized, error, title))


def _correction(quantized: QuantizedModel, error: EpsError) -> dict[str, Any]:
    statistics, change = quantized.statistics, error.after / error.before - 1
    of_steps = ("k", "k_unshrunk", "k_stderr", "r", "residual_std", "kurtosis")
    found = {name: getattr(statistics, name).tolist() for name in of_steps} | {
        "residual_step_correlation": error.step_correlation.tolist(),
        "held_out_change_mean": float(change.mean()),
        "held_out_change_worst": float(change.max()),
    }
    fit = quantized.variance_fit
    return found | ({} if fit is None else {"variance": fit.to_dict()})


def _pictures(quantized: QuantizedModel, error: EpsError, title: str) -> dict[str, Callable[[Path], object]]:
    statistics = quantized.statistics
    found = {"eps_error.png": lambda path: write_figure(path, figures.eps_error(
        error.before.tolist() if error.corrected else None, error.after.tolist(), title=title,
        share=error.share_after.tolist(), share_of_noise=share_of_noise(error.samples),
    ))}
    if statistics is not None:
        found["noise.png"] = lambda path: write_figure(path, figures.noise(
            k=statistics.k.tolist(), r=statistics.r.tolist(), title=title,
            kurtosis=statistics.kurtosis.tolist(), histogram=error.histogram, edges=EDGES.tolist(),
        ))
    return found
