"""What a run leaves of its quantization noise: numbers for results.json, schedule and statistics as files, pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ptq_exp.correction import EDGES, forward_snr
from ptq_exp.noise_stages import EpsError
from ptq_exp.quantization import ranges
from ptq_exp.setup import Setup
from ptq_exp.tracking.plots import plot_bit_schedule, plot_eps_error, plot_noise
from ptq_exp.tracking.results import write_json
from ptq_exp.tracking.sinks import spoils_nothing
from ptq_exp.twin import Twin


def eps_errors(error: EpsError) -> dict[str, float]:
    """Mean over steps of the relative eps error as sampled, and before the correction where there is one."""
    found = {"eps_error": float(error.after.mean())}
    return found | ({"eps_error_uncorrected": float(error.before.mean())} if error.corrected else {})


def noise_account(setup: Setup, twin: Twin, error: EpsError) -> dict[str, Any]:
    """Eps errors, bit schedule and correction for results.json."""
    found: dict[str, Any] = {"eps_error_per_step": error.after.tolist()}
    if error.corrected:
        found["eps_error_uncorrected_per_step"] = error.before.tolist()
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
    """Write quantization.json and, where they exist, bit schedule, noise statistics and their pictures to `folder`.

    Returns:
        The names of the pictures.
    """
    account = twin.report.to_dict() | {"quantizers": ranges(twin.network), "smoothed": twin.smoothed}
    write_json(folder / "quantization.json", account)
    title = f"{setup.model.name}, {setup.config.bits.name}, {len(setup.grid)} steps, eta {setup.grid.eta:g}"
    pictures = []

    def drawn(name: str, draw: Callable[[Path], object]) -> None:
        with spoils_nothing(name, "results.json has its numbers"):
            draw(folder / name)
            pictures.append(name)

    if twin.schedule is not None:
        twin.schedule.save(folder / "bit_schedule.json")
        drawn("bit_schedule.png", lambda path: plot_bit_schedule(
            path, bits=twin.schedule.activation, output_snr=twin.output_snr or {},
            forward_snr=forward_snr(setup.grid).tolist(), title=title,
        ))  # fmt: skip
    if twin.statistics is not None:
        statistics = twin.statistics
        statistics.save(folder / "noise_statistics.npz")
        drawn("eps_error.png", lambda path: plot_eps_error(
            path, error.before.tolist(), error.after.tolist(), title=title))  # fmt: skip
        drawn("noise.png", lambda path: plot_noise(
            path, k=statistics.k.tolist(), r=statistics.r.tolist(), title=title,
            kurtosis=statistics.kurtosis.tolist(), histogram=error.histogram, edges=EDGES.tolist(),
        ))  # fmt: skip
    return pictures
