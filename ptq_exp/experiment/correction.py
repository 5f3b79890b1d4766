"""The stage that fits the correction of quantization noise, and the check of statistics that somebody gives."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from ptq_exp.correction import BitSchedule, MomentChunks, NoiseStatistics
from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.errors import ConfigError, naming
from ptq_exp.experiment.keys import Keys
from ptq_exp.experiment.noise import collect, fit, noise_of_widths
from ptq_exp.experiment.plan import Plan, given_schedule
from ptq_exp.experiment.run import Run
from ptq_exp.experiment.trajectory import trajectory_statistics
from ptq_exp.settings.schema import RULES, CorrectionConfig
from ptq_exp.storage.plain_json import to_plain

log = logging.getLogger("ptq_exp")


def fit_correction(
    run: Run, plan: Plan, config: CorrectionConfig, keys: Keys, quantized: QuantizedModel
) -> QuantizedModel:
    """Fit (or load) the statistics of the noise, where `config` asks for any."""
    if not config.active:
        return quantized
    made_for = _made_for(config, keys, quantized.schedule)
    if config.statistics is not None:
        statistics = _given_statistics(config)
        _check_made_for(statistics, made_for, config.statistics)
    elif config.fit == "trajectory":
        statistics = replace(trajectory_statistics(run, config, keys, quantized), made_for=made_for)
    else:
        chunks = _noise_of(run, plan, config, keys, quantized)
        statistics = replace(fit(run, config, chunks), made_for=made_for)
    log.info("correction %s: %s", config.name, statistics.summary())
    corrected = replace(quantized, statistics=statistics)
    if (found := corrected.variance_fit) is not None:
        log.info("%s", found.summary())
    return corrected


def check_statistics(run: Run, plan: Plan, config: CorrectionConfig, keys: Keys) -> None:
    """Read the file that `correction.statistics` names, if it does, before anything is computed.

    Raises:
        DataError: it cannot be read, or its numbers are no statistics.
        ConfigError: they belong to another model, sampler or quantization.
    """
    schedule = None
    if not config.active or config.statistics is None:
        return
    found_here = plan.bits.schedule in RULES  # known once it is decided, and compared then
    if plan.bits.schedule is not None and not found_here:
        schedule = given_schedule(plan.bits, run.grid)
    statistics, wanted = _given_statistics(config), _made_for(config, keys, schedule)
    _check_made_for(statistics, wanted, config.statistics, ("schedule", "versions") if found_here else ())
    found, expected = tuple(statistics.bias.shape), (len(run.grid), run.model.sample_shape[0])
    if found != expected:
        raise ConfigError(
            f"correction.statistics={config.statistics} has {found[0]} steps and {found[1]} channels, but "
            f"the sampler takes {expected[0]} steps of {expected[1]} channels: correction.statistics=null fits them"
        )


def _noise_of(
    run: Run, plan: Plan, config: CorrectionConfig, keys: Keys, quantized: QuantizedModel
) -> MomentChunks:
    """Noise of the network as it is sampled, at the width of each step."""
    if config.follow == "fp32" and plan.bits.schedule in RULES:  # was measured to choose the widths
        moments = noise_of_widths(run, config, keys.quantization(), quantized)[0].moments
        return MomentChunks(moments, quantized.schedule.rows(plan.widths))
    key = keys.scheduled(quantized.schedule)
    return MomentChunks(collect(run, config, "noise statistics", [quantized.uncorrected], config.follow, key))


def _given_statistics(config: CorrectionConfig) -> NoiseStatistics:
    with naming("correction.statistics="):  # the error begins with the path
        return NoiseStatistics.load(config.statistics)


def _made_for(config: CorrectionConfig, keys: Keys, schedule: BitSchedule | None) -> dict[str, Any]:
    """Return what noise statistics belong to: network, grid, widths, and the parts that they are fitted for."""
    parts = {name: getattr(config, name) for name in ("correlation", "bias", "convention")}
    if config.fit != "estimates":
        parts["fit"] = config.fit
    return to_plain(keys.scheduled(schedule) | {"correction": parts})


def _check_made_for(
    statistics: NoiseStatistics, wanted: dict[str, Any], path: str, unknown: tuple[str, ...] = ()
) -> None:
    """Raise ConfigError unless the statistics were made for the same model, bits, grid and calibration.

    `unknown` names what is not known yet.
    """
    found = statistics.made_for or {}
    for key in sorted((set(wanted) | set(found)) - set(unknown)):
        if found.get(key) != wanted.get(key):
            raise ConfigError(
                f"correction.statistics={path} was made for another {key}: {_short(found.get(key))}, this run has "
                f"{_short(wanted.get(key))}; set correction.statistics=null to fit them"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
