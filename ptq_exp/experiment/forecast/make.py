"""Making the forecast of a run from its settings and a few measurements, and refusing what cannot fit."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

from ptq_exp.errors import PTQError
from ptq_exp.experiment.features import features_key, reference_key
from ptq_exp.experiment.forecast.forecast import Forecast
from ptq_exp.experiment.forecast.free_memory import available_memory
from ptq_exp.experiment.forecast.pipelines import of_pipeline
from ptq_exp.experiment.forecast.probe import in_use, measured
from ptq_exp.experiment.forecast.room import Need, check_disk, check_memory, disk_of
from ptq_exp.experiment.forecast.seconds import stage_seconds
from ptq_exp.experiment.forecast.speeds import Speeds
from ptq_exp.experiment.forecast.work import EXECUTED, FULL, OBSERVED, QUANTIZED, Work, work_of
from ptq_exp.experiment.keys import Keys
from ptq_exp.experiment.noise import eps_error_key
from ptq_exp.experiment.plan import Plan, given_schedule
from ptq_exp.experiment.run import Run
from ptq_exp.experiment.stage import Key
from ptq_exp.pipelines import PipelineModel, RecordedModel
from ptq_exp.quantization import range_table
from ptq_exp.quantization.offload import weight_bytes
from ptq_exp.quantization.save import tensors_bytes
from ptq_exp.settings.schema import RULES, ExperimentConfig
from ptq_exp.storage.plain_json import indented

log = logging.getLogger("ptq_exp")
_LARGEST = 1e9  # bytes of a network that is packed to see how long its file gets
_FAILURES = (
    PTQError, RuntimeError, ArithmeticError, LookupError, AttributeError, TypeError, ValueError, OSError, MemoryError,
)
_STAGES = ("reference", "fp32_images", "fp32_scores", "calibration_set", "quantize", "reconstruct", "proof",
           "bit_schedule", "noise_statistics", "eps_error", "save_quantized", "analysis", "quantized_images", "scores",
           "pairs", "runtime")


def forecast_run(
    run: Run, plan: Plan | None, config: ExperimentConfig, keys: Keys, folder: Path, at_least: float = 0.0
) -> Forecast | None:
    """Forecast a run, and refuse one that cannot fit; a forecast that cannot be made is a line in the log.

    Args:
        at_least: seconds; a run whose network is evaluated for less, as a first look has it, is not forecast, and no
            engine is compiled for the forecast of another. 0 = whatever it takes.

    Raises:
        ConfigError: memory or disk do not suffice; the message names the setting that makes it fit.
    """
    missing = _why_not(run, config, plan)
    if missing is None and at_least and config.runtime.name != "simulate":
        missing = "an engine would have to be compiled for it; forecast=true does"
    if missing is not None:
        log.info("no forecast: %s", missing)
        return None
    try:
        with torch.random.fork_rng():
            if at_least and not run.blockwise and (seconds := _first_look(run, plan, config, keys)) < at_least:
                log.info("no forecast: the network is evaluated for about %.0f s", seconds)
                return None
            made = _forecast(run, plan, config, keys, folder, compiles=not at_least)
    except _FAILURES as error:
        log.info("no forecast: %s", " ".join(str(error).split()) or type(error).__name__)
        return None
    refuse_unfit(made, config, folder)
    return made


def refuse_copy(run: Run) -> None:
    """Raise ConfigError where there is no memory for the quantized copy of the network, before one is made."""
    if not run.blockwise:
        need = Need(weight_bytes(run.model.denoiser), 0.0, "model", run.model.name)
        _check({"a quantized copy of its weights": need}, run.device)


def refuse_unfit(forecast: Forecast, config: ExperimentConfig, folder: Path) -> None:
    """Raise ConfigError for a run whose memory or disk does not suffice."""
    _check(forecast.needs, torch.device(forecast.device))
    cache = Path(config.cache_dir)
    places = {"cache": cache, "run folder": folder}
    settings = {
        "cache": "set cache_dir=PATH on another disk, or make room with `python -m ptq_exp cache prune`",
        "run folder": "set hydra.run.dir=PATH on another disk, or save_quantized=false",
    }
    check_disk({what: (places[what], count) for what, count in forecast.disk.items()}, settings)


def _check(needs: Mapping[str, Need], device: torch.device) -> None:
    if device.type == "cuda":
        check_memory(needs, float(torch.cuda.mem_get_info(device)[0]), "the GPU has")
    else:
        check_memory(needs, available_memory(), "free are")


def _why_not(run: Run, config: ExperimentConfig, plan: Plan | None) -> str | None:
    if isinstance(run.model, RecordedModel):
        return "a network with recorded calls is not measured"
    if run.blockwise and config.runtime.engine is not None:
        return "an engine of a network in files is not measured"
    if run.compile:
        return "model.compile=true is not measured"
    if plan is not None and config.trainer.devices > 1:
        return "several devices are not measured"
    return "bits=auto chooses what is drawn later" if config.bits.limits else None


def _first_look(run: Run, plan: Plan | None, config: ExperimentConfig, keys: Keys) -> float:
    """Return the seconds that all evaluations would take one by one, each as long as one in full precision."""
    call, network = run.example().to(run.device), run.model.denoiser.to(run.device)
    with torch.no_grad():
        seconds, _ = measured(lambda: call.evaluate(network), run.device, repeats=3)
    reused = _reused(run, plan, config, keys)
    work = _work(run, config, plan is not None)
    return seconds * sum(e.samples for stage, found in work.items() if stage not in reused for e in found)


def _forecast(
    run: Run, plan: Plan | None, config: ExperimentConfig, keys: Keys, folder: Path, *, compiles: bool
) -> Forecast:
    started, before = time.perf_counter(), in_use(run.device)
    quantized = plan is not None
    work = _work(run, config, quantized)
    sizes = {network: max((e.largest for found in work.values() for e in found if e.network == network), default=1)
             for network in (FULL, QUANTIZED, OBSERVED, EXECUTED)}
    if config.runtime.name == "simulate":
        sizes[EXECUTED] = sizes[QUANTIZED]
    else:
        sizes[QUANTIZED] = max(sizes[QUANTIZED], sizes[EXECUTED])
    speeds = Speeds(run, plan, sizes, config.runtime, compiles=compiles)
    reused = _reused(run, plan, config, keys)
    seconds = stage_seconds(speeds, config, work, set(reused))
    needs = _needs(speeds, config, quantized)
    shared = disk_of(run.cache.root) == disk_of(folder)  # then the images of both places are one file
    disk = _disk(speeds, config, reused, quantized, shared)
    return Forecast(
        {stage: seconds[stage] for stage in sorted(seconds, key=_place)}, reused, needs, before, disk, str(run.device),
        time.perf_counter() - started,
    )


def _work(run: Run, config: ExperimentConfig, quantized: bool) -> Work:
    pipeline = isinstance(run.model, PipelineModel)
    work = work_of(config, run.grid, quantizes=quantized, quantized=quantized, seed=run.seed,
                   guided=run.guidance_scale != 1 and not pipeline)
    return of_pipeline(work, config, run.model, len(run.grid), run.seed) if pipeline else work


def _place(stage: str) -> tuple[int, str]:
    name = stage.rstrip("_0123456789")
    name = stage if stage in _STAGES else name
    return (_STAGES.index(name) if name in _STAGES else len(_STAGES), stage)


def _reused(run: Run, plan: Plan | None, config: ExperimentConfig, keys: Keys) -> tuple[str, ...]:
    """Return the stages whose whole result lies in the cache."""
    found: dict[str, tuple[str, Key]] = {"fp32_images": ("images", keys.images())}
    if run.extractor is not None:
        found["fp32_scores"] = ("features", features_key(run, keys.images()))
        if isinstance(config.evaluation.reference, dict):
            found["reference"] = ("reference", reference_key(run, config.evaluation))
    if plan is not None:
        found["quantize"] = ("ranges", keys.ranges(1))
        if config.calibration.source is not None:
            found["calibration_set"] = ("calibration", keys.calibration(1))
        if config.reconstruction.active:
            found["reconstruct"] = ("reconstruction", keys.quantization())
        if plan.bits.schedule not in RULES:  # which decide the bits of each step later
            schedule = None if plan.bits.schedule is None else given_schedule(plan.bits, run.grid)
            corrected = config.correction.active
            error = eps_error_key(config.evaluation, keys.estimates(schedule, corrected), corrected)
            found["eps_error"] = ("noise", error)
            found["quantized_images"] = ("quantized_images", keys.quantized_images(schedule, corrected, run.device))
    return tuple(stage for stage, (kind, key) in found.items() if run.cache.has(kind, key))


def _needs(speeds: Speeds, config: ExperimentConfig, quantized: bool) -> dict[str, Need]:
    denoiser, batch = speeds.run.model.denoiser, config.evaluation.batch_size
    # in files: of the copy one block at a time, and as much again for what is computed of it
    copies = weight_bytes(denoiser) if speeds.first is None else 2 * max(
        weight_bytes(denoiser.get_submodule(name)) for name in speeds.first.every
    )
    rows = speeds.rows  # of an image
    needs = {"drawing images": Need(0.0, rows * speeds.full.bytes_each, "evaluation.batch_size", batch)}
    if quantized:
        each = rows * speeds.quantized.bytes_each
        needs["drawing quantized images"] = Need(copies, each, "evaluation.batch_size", batch)
        seen = speeds.halves * speeds.of(OBSERVED).bytes_each
        if speeds.compiles and config.runtime.engine is not None:
            bytes_ = copies + speeds.engine.bytes
            needs["compiling for the engine"] = Need(bytes_, 0.0, "runtime", config.runtime.engine)
        needs["finding ranges"] = Need(copies, seen, "calibration.batch_size", config.calibration.batch_size)
    return needs


def _disk(
    speeds: Speeds, config: ExperimentConfig, reused: Iterable[str], quantized: bool, shared: bool
) -> dict[str, float]:
    run, n = speeds.run, config.evaluation.n_samples
    images = n * float(np.prod(run.model.image_shape))
    cache = 0.0
    if run.cache.mode != "off":
        cache = 0.0 if "fp32_images" in reused else 2 * images  # pieces and the joined file
        if quantized and "quantized_images" not in reused:  # pieces and the joined file
            cache += images if shared else 2 * images
        if quantized and "calibration_set" not in reused and config.calibration.source is not None:
            cache += 2 * 4 * config.calibration.n_samples * float(np.prod(run.model.sample_shape))
    folder = images
    if quantized:
        described = _written(speeds.placed.report.to_dict()) + speeds.in_proportion(
            lambda network: _written({"quantizers": range_table(network)})
        )
        folder += described
        if config.save_quantized:
            known = weight_bytes(speeds.placed.network) <= _LARGEST and speeds.first is None
            folder += described + (
                tensors_bytes(speeds.placed.network) if known else speeds.placed.report.totals["weight_bytes"]
            )
    return {"cache": cache, "run folder": folder}


def _written(values: Mapping[str, object]) -> float:
    return float(sum(map(len, indented(values))))
