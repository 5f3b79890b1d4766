"""Autoencoders of a diffusers folder as first stages."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel

from ptq_exp.diffusion.denoisers import FirstStage
from ptq_exp.diffusion.zoo.build import frozen
from ptq_exp.diffusion.zoo.components import load_component
from ptq_exp.diffusion.zoo.network import component_settings, hollow, named_class
from ptq_exp.diffusion.zoo.settings import Settings
from ptq_exp.errors import one_line

AUTOENCODERS = {cls.__name__: cls for cls in (VQModel, AutoencoderKL, AutoencoderTiny, AsymmetricAutoencoderKL,
                                              AutoencoderDC)}
"""Autoencoders of images that decode without chance."""
NAMES = ("vqvae", "vae", "movq")
"""What pipelines call it."""
_ABSENT = ("shift_factor", "latents_mean", "latents_std")


def read_first_stage(index: Settings, network: Settings, latent: tuple[int, int, int]) -> tuple[FirstStage, str, tuple]:
    """Read the first stage of the pipeline's index: (first stage, name of the component, (C, H, W) of an image).

    Args:
        index: the pipeline's `model_index.json`.
        network: `config.json` of the network that works on its latents.
        latent: (C, H, W) of a latent.

    Raises:
        CheckpointError: none, several, of an unknown class, one that shifts its latents, or that does not take a
            latent of this shape.
    """
    named = [name for name in NAMES if named_class(index, name) is not None]
    if len(named) != 1:
        found = " and ".join(named) or "no first stage"
        raise index.error(f"names {found}; a latent model has one of {', '.join(NAMES)}")
    component = named[0]
    settings, kind = component_settings(index, component, AUTOENCODERS)
    cls = AUTOENCODERS[kind]
    config = settings.of(cls)
    scale = settings.require("scaling_factor", config["scaling_factor"], lambda factor: 0 < factor < math.inf,
                             "choose a positive number")
    for key in _ABSENT:
        # diffusers' own pipelines of these kinds do not shift latents
        if config.get(key):
            raise settings.error(f"{key}={config[key]}: only latents that are scaled alone are known; choose null")
    image = _image_shape(settings, cls, config, network, latent)
    return frozen(FirstStage(load_component(cls, index.root, component), float(scale))), component, image


def _image_shape(
    settings: Settings, cls: type, config: Mapping, network: Settings, latent: tuple[int, int, int]
) -> tuple[int, int, int]:
    """Return what comes out when a latent is decoded, by shapes alone."""
    module = hollow(settings, cls, config)
    try:
        decoded = module.decode(torch.empty(1, *latent, device="meta")).sample
    except Exception as error:  # whatever the library stumbles over
        raise settings.error(
            f"cannot decode a latent of {latent} (channels, height, width), which in_channels and sample_size of "
            f"{network.file} say; latent_channels={config['latent_channels']} ({one_line(error)})"
        ) from error
    return tuple(decoded.shape[1:])
