"""The stage that measures how an engine executes the quantized model, beside the simulation and full precision."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from ptq_exp.deploy.measure import Trajectory, call_of, execution_entry, faithfulness, networks, timed, times_entry
from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.experiment.run import Run
from ptq_exp.experiment.stage import Made, Record
from ptq_exp.results.sinks import spoils_nothing
from ptq_exp.runtime.base import takes
from ptq_exp.runtime.memory import peak_bytes
from ptq_exp.settings.schema import ExperimentConfig
from ptq_exp.settings.schema_machine import RuntimeConfig
from ptq_exp.storage.plain_json import write_json

log = logging.getLogger("ptq_exp")

FILE = "runtime.json"
"""What executes each operation of the network."""


def executed_by(quantized: QuantizedModel, settings: RuntimeConfig, run: Run) -> QuantizedModel:
    """Make the model that is sampled: executed by the runtime of the settings."""
    return quantized.on(settings.name, options_of(settings.name, settings.options, run))


def options_of(name: str, options: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Add to the options of a runtime where it keeps compiled models."""
    return dict(options) | ({"cache": run.cache} if takes(name, "cache") else {})


def watched_denoiser(quantized: QuantizedModel, config: ExperimentConfig) -> Trajectory | None:
    """Return the simulation's denoiser, watched for `measure_execution`; None where it draws nothing for that."""
    settings = config.runtime
    if settings.compare is None or not settings.measure:
        return None
    return Trajectory(quantized.denoiser, len(quantized.grid), settings.measure_seconds)


def measure_execution(
    run: Run, config: ExperimentConfig, quantized: QuantizedModel, watched: Trajectory | None, drawn: np.ndarray
) -> Made:
    """Measure times, faithfulness and what runs as integers, on the engine of the settings.

    Each part that fails is a warning.

    Args:
        watched: what the simulation drew the images `drawn` with, see `watched_denoiser`.

    Returns:
        The entry `runtime` of results.json.
    """
    settings, images = config.runtime, config.evaluation.batch_size
    engine = quantized.on(settings.engine, options_of(settings.engine, settings.engine_options, run))
    call, steps = call_of(engine, images).to(run.device), len(run.grid)
    entry: dict[str, Any] = {}
    with spoils_nothing("runtime.eps_error", "the images are in samples.npz"):
        simulated = None if watched is None else (watched, drawn)
        entry |= faithfulness(engine, images, config.seed, settings.measure_seconds, simulated=simulated)
    found = networks(engine)
    with spoils_nothing("runtime.ms_per_evaluation", "python -m ptq_exp bench measures it"):
        times = timed(found, call, settings.measure, settings.measure_seconds)
        entry |= {"batch_size": images, **times_entry(times, settings.engine, images, steps)}
    if settings.measure_memory:
        with spoils_nothing("runtime.peak_bytes", "python -m ptq_exp bench memory=true measures it"):
            entry["peak_bytes"] = peak_bytes(found, call)
    entry |= execution_entry(engine.runtime)
    rows = [asdict(row) for row in engine.runtime.account()]
    return Made(entry, Record({"runtime": entry}, {FILE: lambda path: write_json(path, {"layers": rows})}))


def line(entry: Mapping[str, Any]) -> str:
    """Say in one line how simulation and engine compare."""
    engine, ms = entry["engine"], entry.get("ms_per_evaluation", {})
    parts = [f"{entry['int8_share']:.2%} of the MACs of its layers as 8-bit integers"]
    if "psnr" in entry:
        parts.append(f"images {entry['psnr']:.1f} dB from the simulation's ({entry['images']} images)")
    elif "eps_error" in entry:
        parts.append(f"noise estimates {entry['eps_error']:.2%} from the simulation's")
    mine = ms.get(f"{engine}_int8")
    if mine is not None:
        parts.append(f"{mine:.1f} ms per evaluation, simulation {ms['simulation']:.1f}")
        parts += [f"full precision {ms['torch_fp32']:.1f} ms"] if "torch_fp32" in ms else []
    return f"{engine}: " + "; ".join(parts)
