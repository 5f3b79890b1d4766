"""What an experiment cannot ask of a pipeline, which is driven by its own scheduler."""

from __future__ import annotations

import logging

from ptq_exp.errors import ConfigError
from ptq_exp.settings.schema import ExperimentConfig

log = logging.getLogger("ptq_exp")


def check_pipeline(config: ExperimentConfig) -> None:
    """Say what is left out with a pipeline, before anything is computed.

    Raises:
        ConfigError: a setting that needs noise levels, or states that no pipeline makes.
    """
    for setting, value, only in (
        ("calibration.source", config.calibration.source, "denoise"),
        ("calibration.labels", config.calibration.labels, "paired"),
        ("sampler.solver", config.sampler.solver, "ddim"),
    ):
        if value not in (None, only):
            raise ConfigError(
                f"{setting}={value}: of a pipeline the calls that it makes are recorded; set {setting}={only}"
            )
    if config.trainer.cuda_graph:
        raise ConfigError(
            "trainer.cuda_graph=true: what a pipeline gives its network changes from call to call, which a recording "
            "would not see; set trainer.cuda_graph=false"
        )
    if config.bits.schedule == "snr":
        raise ConfigError(
            "bits.schedule=snr: a pipeline's scheduler says no noise levels; set bits.schedule=budget, or a list"
        )
    if config.correction.active and config.correction.fit == "trajectory":
        raise ConfigError(
            "correction.fit=trajectory: a pipeline's scheduler makes the steps, which the fit would have to know; set "
            "correction.fit=estimates"
        )
    if config.correction.active and config.correction.variance:
        log.warning(
            "correction.variance: a pipeline's scheduler makes no room for noise of the estimates; their mean alone is "
            "corrected"
        )
