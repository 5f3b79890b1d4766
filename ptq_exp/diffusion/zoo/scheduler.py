"""The scheduler settings of a diffusers folder in our terms."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

from diffusers import DDIMScheduler

from ptq_exp.diffusion.time_grid import NoiseSchedule
from ptq_exp.errors import ConfigError

log = logging.getLogger(__name__)
_BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")


class Scheduler(NamedTuple):
    """What the model was trained with, whether x0 is clamped to [-1, 1], and how times are spaced."""

    schedule: NoiseSchedule
    clip_sample: bool
    spacing: str


def read_scheduler(config: Mapping | None, path: object) -> Scheduler:
    """Translate a `scheduler_config.json`; None = DDPM's linear schedule of 1000 steps (logged).

    Raises:
        ConfigError: the model predicts something else than the noise, or is sampled in a way that is not implemented
            (thresholding, clipping to another range, zero terminal SNR, schedules without betas).
    """
    if config is None:
        log.warning("%s: no scheduler settings; assuming linear betas 1e-4..0.02 over 1000 steps, x0 clipped", path)
        config = {"beta_schedule": "linear"}
    _refuse_the_unknown(config, path)
    betas = {key: config[key] for key in _BETAS if key in config}
    try:
        alphas_cumprod = DDIMScheduler(**betas).alphas_cumprod.double()
    except NotImplementedError as error:
        raise ConfigError(f"model.checkpoint={path}: unknown beta_schedule={config.get('beta_schedule')}") from error
    final = 1.0 if config.get("set_alpha_to_one", True) else float(alphas_cumprod[0])
    schedule = NoiseSchedule(alphas_cumprod, steps_offset=config.get("steps_offset", 0), final_alpha_cumprod=final)
    return Scheduler(schedule, bool(config.get("clip_sample", True)), config.get("timestep_spacing", "leading"))


def _refuse_the_unknown(config: Mapping, path: object) -> None:
    wanted = {"prediction_type": "epsilon", "thresholding": False, "rescale_betas_zero_snr": False,
              "clip_sample_range": 1.0}  # fmt: skip
    for key, value in wanted.items():
        found = config.get(key, value)
        if found != value and not (key == "clip_sample_range" and not config.get("clip_sample", True)):
            raise ConfigError(
                f"model.checkpoint={path}: its scheduler says {key}={found}; only models with {key}={value} can be "
                "sampled here"
            )
    if "beta_schedule" not in config and config.get("trained_betas") is None:
        raise ConfigError(
            f"model.checkpoint={path}: its scheduler ({config.get('_class_name')}) has no betas; only DDPM and DDIM "
            "schedules are known"
        )
