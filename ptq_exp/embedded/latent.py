"""The embedded latent models, a U-Net and a DiT: 32x32 digits through a VQ autoencoder, class-conditional."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from ptq_exp.diffusion import DiffusionModel, FirstStage, NoiseSchedule, SamplerDefaults
from ptq_exp.diffusion.zoo.build import frozen, torch_dtype
from ptq_exp.embedded.digits import LATENT_IMAGE_SIZE, N_CLASSES
from ptq_exp.embedded.networks import LATENT_CHANNELS, TRAIN_STEPS, build_autoencoder, build_dit, build_latent_unet
from ptq_exp.embedded.weights_file import WEIGHTS, load_weights
from ptq_exp.storage.atomic import file_digest

GUIDANCE_SCALE = 1.5
UNET_BLOCKS = {"blocks": ("*resnets.*", "*transformer_blocks.*")}
DIT_BLOCKS = {
    "blocks": ("*transformer_blocks.*",), "first_layers": ("*pos_embed.proj",), "last_layers": ("*proj_out_2",)
}
"""Names of the blocks, and of the first and the last layer where they are not those of U-Nets."""


def first_stage(folder: Path = WEIGHTS) -> FirstStage:
    """Load the VQ autoencoder of `folder`; its latents are scaled to unit variance as its card says.

    Raises:
        CheckpointError: the weights are missing, truncated, or of another network.
    """
    autoencoder = build_autoencoder()
    load_weights(autoencoder, folder / "digits_vq.safetensors")
    scaling_factor = json.loads((folder / "digits_vq.json").read_text(encoding="utf-8"))["scaling_factor"]
    autoencoder.register_to_config(scaling_factor=scaling_factor)
    return FirstStage(autoencoder, scaling_factor).eval()


def digits_ldm_model(
    name: str = "digits_ldm", checkpoint: str | None = None, dtype: str = "float32"
) -> DiffusionModel:
    """Load the embedded latent model: 8x8x3 latents of 32x32 digits, ten classes, LDM's schedule, 2.3 M parameters.

    Args:
        name: what tables call it.
        checkpoint: a file of `python -m ptq_exp train_embedded latent_unet`, made with the shipped autoencoder;
            None = the weights inside the package.
        dtype: of the denoiser.

    Raises:
        CheckpointError: see the message; the file is missing, truncated, or of another network.
        ConfigError: an unknown dtype.
    """
    return _loaded(build_latent_unet(), "digits_latent_unet", UNET_BLOCKS, name, checkpoint, dtype)


def digits_dit_model(
    name: str = "digits_dit", checkpoint: str | None = None, dtype: str = "float32"
) -> DiffusionModel:
    """Load the embedded class-conditional transformer on the latents of `digits_ldm`, 0.8 M parameters.

    Args:
        checkpoint: a file of `python -m ptq_exp train_embedded dit`; None = the weights inside the package.
        name, dtype: see `digits_ldm_model`, and for what is raised.
    """
    return _loaded(build_dit(), "digits_dit", DIT_BLOCKS, name, checkpoint, dtype)


def _loaded(
    denoiser: nn.Module, file: str, patterns: Mapping[str, tuple[str, ...]], name: str, checkpoint: str | None,
    dtype: str,
) -> DiffusionModel:
    """Fill `denoiser` from a checkpoint, else from a file of the package; the digest is of this and of the VQ file."""
    own_digest = load_weights(denoiser, Path(checkpoint) if checkpoint else WEIGHTS / f"{file}.safetensors")
    vq_digest = file_digest(WEIGHTS / "digits_vq.safetensors")
    digest = hashlib.sha256((own_digest + vq_digest).encode()).hexdigest()
    frozen_denoiser = frozen(denoiser, torch_dtype(dtype), checkpoint)
    return latent_model(frozen_denoiser, first_stage(), patterns, name=name, digest=digest)


def latent_model(
    denoiser: nn.Module, autoencoder: FirstStage, patterns: Mapping[str, tuple[str, ...]], *, name: str, digest: str
) -> DiffusionModel:
    """Build the model of a denoiser, trained or not, on the latents of `autoencoder`; `patterns` as `UNET_BLOCKS`."""
    side = LATENT_IMAGE_SIZE // 4
    return DiffusionModel(
        name=name,
        denoiser=denoiser.eval(),
        schedule=NoiseSchedule.latent_diffusion(total=TRAIN_STEPS),
        sample_shape=(LATENT_CHANNELS, side, side),
        clip_sample=False,
        digest=digest,
        first_stage=autoencoder,
        n_classes=N_CLASSES,
        null_label=N_CLASSES,
        sampler=SamplerDefaults(20, "leading", 0.0, GUIDANCE_SCALE),
        image_shape=(1, LATENT_IMAGE_SIZE, LATENT_IMAGE_SIZE),
        **patterns,
    )
