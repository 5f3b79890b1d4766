"""What a run leaves of its quantization noise: numbers for results.json, schedule and statistics as files, pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ptq_exp.correction import EDGES, forward_snr, share_of_noise
from ptq_exp.experiment.noise import EpsError
from ptq_exp.experiment.run import Setup
from ptq_exp.experiment.twin import Twin
from ptq_exp.quantization import range_table
from ptq_exp.reports.plots import plot_bit_schedule, plot_eps_error, plot_noise
from ptq_exp.results.sinks import spoils_nothing
from ptq_exp.storage.plain_json import write_json


def eps_errors(error: EpsError) -> dict[str, float]:
    """Means over steps of the relative eps error and its share of a fixed pattern as sampled; see `EpsError`.

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


def noise_account(setup: Setup, twin: Twin, error: EpsError) -> dict[str, Any]:
    """Eps errors, bit schedule and correction for results.json."""
    found: dict[str, Any] = {
        "eps_error_samples": error.samples,
        "fixed_pattern_share_independent": share_of_noise(error.samples),
        "eps_error_per_step": error.after.tolist(),
        "fixed_pattern_share_per_step": error.share_after.tolist(),
    }
    if error.corrected:
        found["eps_error_uncorrected_per_step"] = error.before.tolist()
        found["fixed_pattern_share_uncorrected_per_step"] = error.share_before.tolist()
    if twin.schedule is not None:
        schedule = twin.schedule
        found["bit_schedule"] = {
            "rule": schedule.rule,
            "activation": list(schedule.activation),
            "shares": dict(zip(map(str, schedule.widths), schedule.shares(schedule.widths), strict=True)),
        }
    if twin.statistics is not None:
        change = error.after / error.before - 1
        statistics = twin.statistics
        found["correction"] = {
            "k": statistics.k.tolist(),
            "k_unshrunk": statistics.k_unshrunk.tolist(),
            "k_stderr": statistics.k_stderr.tolist(),
            "r": statistics.r.tolist(),
            "residual_std": statistics.residual_std.tolist(),
            "kurtosis": statistics.kurtosis.tolist(),
            "residual_step_correlation": error.step_correlation.tolist(),
            "held_out_change_mean": float(change.mean()),
            "held_out_change_worst": float(change.max()),
        }
        if (fit := twin.variance_fit(setup)) is not None:
            found["correction"]["variance"] = fit.to_dict()
    return found


def write_account(setup: Setup, twin: Twin, error: EpsError, folder: Path) -> list[str]:
    """Write quantization.json, eps_error.png and, where they exist, bit schedule, noise statistics and their pictures.

    Returns:
        The names of the pictures.
    """
    account = twin.report.to_dict() | {
        "quantizers": range_table(twin.network), "transforms": [made.to_dict() for made in twin.transforms]
    }  # fmt: skip
    write_json(folder / "quantization.json", account)
    title = f"{setup.model.name}, {setup.config.bits.name}, {len(setup.grid)} steps, eta {setup.grid.eta:g}"
    pictures = []

    def drawn(name: str, draw: Callable[[Path], object]) -> None:
        with spoils_nothing(name, "results.json has its numbers"):
            draw(folder / name)
            pictures.append(name)

    drawn("eps_error.png", lambda path: plot_eps_error(
        path, error.before.tolist() if error.corrected else None, error.after.tolist(), title=title,
        share=error.share_after.tolist(), share_of_noise=share_of_noise(error.samples),
    ))  # fmt: skip
    if twin.schedule is not None:
        twin.schedule.save(folder / "bit_schedule.json")
        drawn("bit_schedule.png", lambda path: plot_bit_schedule(
            path, bits=twin.schedule.activation, output_snr=twin.output_snr or {},
            forward_snr=forward_snr(setup.grid).tolist(), title=title,
        ))  # fmt: skip
    if twin.statistics is not None:
        statistics = twin.statistics
        statistics.save(folder / "noise_statistics.npz")
        drawn("noise.png", lambda path: plot_noise(
            path, k=statistics.k.tolist(), r=statistics.r.tolist(), title=title,
            kurtosis=statistics.kurtosis.tolist(), histogram=error.histogram, edges=EDGES.tolist(),
        ))  # fmt: skip
    return pictures
