"""All models by name: the embedded ones and the published ones."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING

from ptq_exp.errors import CheckpointError, ConfigError, nearest
from ptq_exp.storage.paths import with_homes

if TYPE_CHECKING:
    from torch import Tensor

    from ptq_exp.diffusion import DiffusionModel

MODELS = {
    "digits": "ptq_exp.embedded:digits_model",
    "digits_ldm": "ptq_exp.embedded:digits_ldm_model",
    "digits_dit": "ptq_exp.embedded:digits_dit_model",
    "digits_text": "ptq_exp.embedded.prompted:digits_text",
    "digits_flow": "ptq_exp.embedded.prompted:digits_flow",
    "ddim_cifar10": "ptq_exp.diffusion.zoo.improved:ddim_cifar10",
    "ddim_imagenet64": "ptq_exp.diffusion.zoo.improved:ddim_imagenet64",
    "ddpm_cifar10": "ptq_exp.diffusion.zoo.ddpm:ddpm_cifar10",
    "ldm4_imagenet256": "ptq_exp.diffusion.zoo.latent:ldm4_imagenet256",
    "ldm4_lsun_bedrooms256": "ptq_exp.diffusion.zoo.latent:ldm4_lsun_bedrooms256",
    "diffusers": "ptq_exp.diffusion.zoo.folder:diffusers_folder",
    "pipeline": "ptq_exp.pipelines.folder:pipeline_folder",
}
"""Name -> `module:function`, imported when the model is built. Add your own: (checkpoint, *, name, dtype) -> model."""


def load_model(name: str, checkpoint: str | None = None, *, dtype: str = "float32", **options) -> DiffusionModel:
    """Build a model of `MODELS`, frozen and in evaluation mode, on the CPU.

    Args:
        name: a key of `MODELS`; also what tables call the model.
        checkpoint: the original file (or diffusers folder); None = the embedded weights of `digits*`,
            random weights (warned about) of the others.
        dtype: of the denoiser: float32, bfloat16, float16 (float64 for tests).
        options: further arguments of the model's builder, such as `ema` of `ldm4_lsun_bedrooms256`.

    Raises:
        ConfigError: an unknown name, option or dtype.
        CheckpointError: the checkpoint cannot be read safely, belongs to another network, or holds NaN or infinity.
    """
    if name not in MODELS:
        raise ConfigError(f"model.name={name}: {nearest(name, MODELS)}")
    module, _, function = MODELS[name].partition(":")
    build = getattr(import_module(module), function)
    # every model of the command has the settings of all; what is not set asks for nothing
    options = {option: value for option, value in options.items() if value is not None}
    taken = inspect.signature(build).parameters
    _check_options(name, taken, options)
    arguments = {"name": name, **options}
    if checkpoint is not None:
        arguments["checkpoint"] = with_homes(checkpoint, "model.checkpoint")
    if "dtype" in taken:
        arguments["dtype"] = dtype
    elif dtype != "float32":
        raise ConfigError(f"model.dtype={dtype}: the model {name} is made for float32 alone")
    if checkpoint is None and "checkpoint" in taken and taken["checkpoint"].default is inspect.Parameter.empty:
        raise ConfigError(f"model.checkpoint=null: the model {name} needs a checkpoint")
    model = build(**arguments)
    check_numbers(model, f"model.checkpoint={checkpoint}")
    return model


def check_numbers(model: DiffusionModel, where: str) -> None:
    """Raise CheckpointError if a weight is NaN or infinite, or the noise schedule is none; `where` begins the message.

    Infinity in a buffer is let pass: masks of attention hold it.
    """
    import torch

    from ptq_exp.storage.finite import bad_values, is_finite, require_finite

    for part in filter(None, (model.denoiser, model.first_stage)):
        of = "" if part is model.denoiser else " of the first stage"
        weights = ((f"{name}{of}", value) for name, value in part.named_parameters())
        require_finite(weights, where, "give another file, or another model.dtype if that holds them", CheckpointError)
        for name, value in part.named_buffers():
            if not is_finite(value, or_infinite=True):
                raise CheckpointError(f"{where}: {name}{of} holds {bad_values(value)}; give another file")
    levels = model.schedule.alphas_cumprod
    inside = (levels >= 0) & (levels <= 1) & torch.cat([levels[:-1] > 0, torch.ones_like(levels[-1:], dtype=bool)])
    if len(levels) == 0 or not bool(inside.all()) or bool((levels.diff() > 0).any()):
        raise CheckpointError(
            f"{where}: alphas_cumprod of its noise schedule must fall from at most 1, to 0 at the last time only, got "
            f"{_ends(levels)}; mend the settings of its scheduler"
        )


def _ends(values: Tensor) -> str:
    return f"{float(values[0]):g} to {float(values[-1]):g}" if len(values) else "nothing"


def _check_options(name: str, taken: Iterable[str], options: dict) -> None:
    """ConfigError for an option that the builder does not have."""
    known = set(taken) - {"name", "checkpoint", "dtype"}
    for option in options:
        if option not in known:
            which = nearest(option, known) if known else "there are none"
            raise ConfigError(f"model.{option}: the model {name} has no such option; {which}")
