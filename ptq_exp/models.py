"""All models by name: the embedded ones and the published ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING

from ptq_exp.errors import ConfigError
from ptq_exp.paths import with_homes

if TYPE_CHECKING:
    from ptq_exp.diffusion import DiffusionModel

MODELS = {
    "digits": "ptq_exp.embedded:digits_model",
    "digits_ldm": "ptq_exp.embedded:digits_ldm_model",
    "ddim_cifar10": "ptq_exp.diffusion.zoo:ddim_cifar10",
    "ddim_imagenet64": "ptq_exp.diffusion.zoo:ddim_imagenet64",
    "ddpm_cifar10": "ptq_exp.diffusion.zoo:ddpm_cifar10",
    "ldm4_imagenet256": "ptq_exp.diffusion.zoo:ldm4_imagenet256",
    "ldm4_lsun_bedrooms256": "ptq_exp.diffusion.zoo:ldm4_lsun_bedrooms256",
    "diffusers": "ptq_exp.diffusion.zoo:diffusers_folder",
}
"""Name -> `module:function`, imported when the model is built. Add your own: (checkpoint, *, name, dtype) -> model."""


def load_model(name: str, checkpoint: str | None = None, *, dtype: str = "float32", **options) -> DiffusionModel:
    """Build a model of `MODELS`, frozen and in evaluation mode, on the CPU.

    Args:
        name: a key of `MODELS`; also what tables call the model.
        checkpoint: the original file (or diffusers folder); None = the embedded weights of `digits` and `digits_ldm`,
            random weights (warned about) of the others.
        dtype: of the denoiser: float32, bfloat16, float16 (float64 for tests).
        options: further arguments of the model's builder, such as `ema` of `ldm4_lsun_bedrooms256`.

    Raises:
        ConfigError: an unknown name, option or dtype.
        CheckpointError: the checkpoint cannot be read safely or belongs to another network.
    """
    if name not in MODELS:
        raise ConfigError(f"model.name={name}: {_nearest(name, MODELS)}")
    module, _, function = MODELS[name].partition(":")
    build = getattr(import_module(module), function)
    _check_options(name, build, options)
    arguments = {"name": name, **options}
    if checkpoint is not None:
        arguments["checkpoint"] = with_homes(checkpoint, "model.checkpoint")
    if "dtype" in inspect.signature(build).parameters:
        arguments["dtype"] = dtype
    elif dtype != "float32":
        raise ConfigError(f"model.dtype={dtype}: the model {name} is made for float32 alone")
    return build(**arguments)


def _check_options(name: str, build: Callable, options: dict) -> None:
    """ConfigError for an option that the builder does not have."""
    known = set(inspect.signature(build).parameters) - {"name", "checkpoint", "dtype"}
    for option in options:
        if option not in known:
            which = _nearest(option, known) if known else "there are none"
            raise ConfigError(f"model.{option}: the model {name} has no such option; {which}")


def _nearest(found: str, known: Iterable[str]) -> str:
    """Help for a misspelt word."""
    close = get_close_matches(found, known, n=1)
    return f"did you mean {close[0]}?" if close else f"choose one of {', '.join(sorted(known))}"
