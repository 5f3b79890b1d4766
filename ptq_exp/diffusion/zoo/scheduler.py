"""The scheduler settings of a diffusers folder in our terms.

Betas, prediction type and clipping belong to the model and are followed or refused. So are spacing, offset and the last
noise level, which say how a grid is laid. The solver is the user's choice (`sampler=`): its own settings, such as an
order, are named in the log where they are not those that its class has without them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import diffusers
import torch

from ptq_exp.diffusion.prediction import PREDICTIONS
from ptq_exp.diffusion.time_grid import NoiseSchedule
from ptq_exp.diffusion.zoo.settings import Settings, whole
from ptq_exp.errors import one_line

log = logging.getLogger(__name__)
# both step as Song et al. 2021, eq. 12, with the network's eps beside a clipped x0
_DDIM = ("DDIMScheduler", "DDIMParallelScheduler")
KNOWN = (
    *_DDIM, "DDPMScheduler", "DDPMParallelScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler", "SASolverScheduler",
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
)
"""Classes of discrete schedules of betas; all others walk another process, or times of their own."""
_CONVERTS = {"DDIMPipeline": "DDIMScheduler", "PNDMPipeline": "PNDMScheduler"}
"""Pipelines that make their own scheduler of the settings of any other."""

_ONLY = {
    "thresholding": False, "rescale_betas_zero_snr": False, "use_flow_sigmas": False,
    "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False, "use_lu_lambdas": False,
    "use_dynamic_shifting": False, "sigma_min": None, "sigma_max": None, "shift_terminal": None,
    "timestep_type": "discrete", "interpolation_type": "linear",
}
_OF_SOLVERS = (
    "algorithm_type", "solver_order", "solver_type", "lower_order_final", "euler_at_final", "predict_x0",
    "disable_corrector", "solver_p", "predictor_order", "corrector_order", "tau_func", "lambda_min_clipped",
    "skip_prk_steps", "variance_type",
)
_CHOICES = {"timestep_spacing": ("leading", "linspace", "trailing"), "final_sigmas_type": ("zero", "sigma_min")}
_WHY = {
    "rescale_betas_zero_snr": ": alpha_bar is 0 at its last time, where an estimate of the noise says nothing of x0"
}
_LONGEST = 1_000_000


class Scheduler(NamedTuple):
    """What the model was trained with and predicts, whether x0 is clamped to [-1, 1], and how times are spaced."""

    schedule: NoiseSchedule
    clip_sample: bool
    spacing: str
    name: str
    converted: bool = False
    prediction: str = "epsilon"


def read_scheduler(settings: Settings, named: str | None = None, pipeline: str | None = None) -> Scheduler:
    """Translate a `scheduler_config.json`. What is absent in it means what its class in diffusers takes.

    Args:
        settings: the file.
        named: the class that the pipeline's index names; None = there is no index.
        pipeline: class of the pipeline: DDIM and PNDM make their own scheduler of any.

    Raises:
        ConfigError: an unknown class, impossible values, or a model that is sampled in a way that is not implemented
            (thresholding, clipping to another range, sigmas of Karras et al., flows; zero terminal SNR, where a noise
            estimate says nothing of the image).
    """
    made, converted = _made(settings, named, pipeline)
    kind = type(made).__name__
    config = _config(made)
    _check_values(settings, kind, config)
    _refuse_the_unknown(settings, kind, config)
    levels = _levels(settings, made, config)
    _name_what_is_left(settings, type(made), config)
    # the solvers that cannot reach clean images (DEIS, SA) have no setting for it
    clean = config.get("set_alpha_to_one", True) and config.get("final_sigmas_type", "zero") == "zero"
    schedule = NoiseSchedule(
        levels, steps_offset=config.get("steps_offset", 0), final_alpha_cumprod=1.0 if clean else float(levels[0]),
        rederive_eps=kind not in _DDIM, constant_stride=kind in _DDIM,
    )
    # DPM-Solver's single steps are spaced as the multistep ones are without a setting
    spacing = config.get("timestep_spacing", "linspace")
    clip = bool(config.get("clip_sample", False))
    return Scheduler(schedule, clip, spacing, kind, converted, config.get("prediction_type", "epsilon"))


def _made(settings: Settings, named: str | None, pipeline: str | None) -> tuple[Any, bool]:
    """Return the scheduler as diffusers makes it, and whether the pipeline turned it into one of another class."""
    own = settings.values.get("_class_name")
    kind = named if own is None else own
    if kind not in KNOWN:
        what = f"its scheduler ({kind}) has no betas, or times of its own" if kind else "no _class_name"
        raise settings.error(f"{what}; known are {', '.join(KNOWN)}")
    if named is not None and kind != named:
        raise settings.error(f"_class_name={kind}, but model_index.json names {named} as scheduler: change one of them")
    cls = getattr(diffusers, kind)
    arguments = settings.of(cls)
    _check_betas(settings, arguments)
    try:
        made = cls.from_config(dict(settings.values))
        into = _CONVERTS.get(pipeline or "", kind)
        return (made, False) if into == kind else (getattr(diffusers, into).from_config(made.config), True)
    except NotImplementedError as error:
        raise settings.error(f"unknown beta_schedule={arguments.get('beta_schedule')}: {kind} has no such") from error
    except Exception as error:  # whatever the class says to settings that it does not take together
        raise settings.error(f"{kind} cannot be made from it ({one_line(error)})") from error


def _config(made: Any) -> dict[str, Any]:
    """Return the settings that the class of `made` has: diffusers keeps those of others, without effect."""
    known = Settings.parameters(type(made))
    return {key: value for key, value in made.config.items() if key in known}


def _check_betas(settings: Settings, arguments: Mapping[str, Any]) -> None:
    """Return the line about betas that no schedule can be made of; `arguments` are of the right types."""
    total = settings.require(
        "num_train_timesteps", arguments["num_train_timesteps"], lambda n: whole(n) and n <= _LONGEST,
        f"choose 1..{_LONGEST}",
    )
    trained = arguments.get("trained_betas")
    if trained is not None:
        if len(trained) != total:
            raise settings.error(f"trained_betas has {len(trained)} values, num_train_timesteps={total}: they disagree")
        return
    start, end = arguments["beta_start"], arguments["beta_end"]
    if not 0 < start <= end < 1:
        raise settings.error(f"beta_start={start}, beta_end={end}: betas lie between 0 and 1, and do not decrease")


def _levels(settings: Settings, made: Any, config: Mapping[str, Any]) -> torch.Tensor:
    """alpha_bar as the scheduler has it, float64 [T]."""
    betas = made.betas.double()
    if not bool(((betas > 0) & (betas < 1)).all()):
        raise settings.error("trained_betas: betas lie between 0 and 1, both excluded")
    levels = made.alphas_cumprod.double()
    if len(levels) != config["num_train_timesteps"] or not bool((levels.diff() < 0).all()) or float(levels[-1]) < 1e-30:
        raise settings.error(
            f"{config['num_train_timesteps']} betas up to {float(betas.max()):.3g} leave no signal: alpha_bar, the "
            "product of 1 - beta, must decrease and stay above 0; check beta_end and num_train_timesteps"
        )
    return levels


def _check_values(settings: Settings, kind: str, config: Mapping[str, Any]) -> None:
    for key, choices in _CHOICES.items():
        if key in config:
            settings.require(key, config[key], lambda value, choices=choices: value in choices,
                             f"{kind} takes {', '.join(choices)}")
    last = config["num_train_timesteps"] - 1
    settings.require("steps_offset", config.get("steps_offset", 0), lambda n: whole(n, 0) and n <= last,
                     f"choose 0..{last}, an index of the schedule")


def _refuse_the_unknown(settings: Settings, kind: str, config: Mapping[str, Any]) -> None:
    wanted = _ONLY | ({"clip_sample_range": 1.0} if config.get("clip_sample") else {})
    for key, value in wanted.items():
        found = config.get(key, value)
        if found != value:
            why = _WHY.get(key, "")
            raise settings.error(
                f"its scheduler ({kind}) says {key}={found}{why}; only models with {key}={value} can be sampled here"
            )
    if (found := config.get("prediction_type", "epsilon")) not in PREDICTIONS:
        raise settings.error(
            f"its scheduler ({kind}) says prediction_type={found}; only models with prediction_type="
            f"{' or '.join(PREDICTIONS)} can be sampled here"
        )


def _name_what_is_left(settings: Settings, cls: type, config: Mapping[str, Any]) -> None:
    """Log the solver's own settings, which choosing another solver leaves behind."""
    defaults = Settings.parameters(cls)
    left = [f"{key}={config[key]}" for key in _OF_SOLVERS if key in config and config[key] != defaults[key]]
    if left:
        log.warning(
            "%s/%s: %s: settings of the solver of %s, not followed: here sampler= chooses the solver, and "
            "sampler.eta the noise that DDIM adds", settings.root, settings.file, ", ".join(left), cls.__name__,
        )
