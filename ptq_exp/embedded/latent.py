"""The embedded latent model: 32x32 digits through a VQ autoencoder, class-conditional."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ptq_exp.diffusion import ClassConditionalUNet, DiffusionModel, FirstStage, NoiseSchedule, SamplerDefaults
from ptq_exp.diffusion.zoo.build import frozen, torch_dtype
from ptq_exp.embedded.digits import LATENT_IMAGE_SIZE, N_CLASSES
from ptq_exp.embedded.networks import LATENT_CHANNELS, TRAIN_STEPS, build_autoencoder, build_latent_unet
from ptq_exp.embedded.weights_file import WEIGHTS, load_weights
from ptq_exp.storage.atomic import file_digest

GUIDANCE_SCALE = 1.5


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
    denoiser = build_latent_unet()
    path = Path(checkpoint) if checkpoint else WEIGHTS / "digits_latent_unet.safetensors"
    unet_digest = load_weights(denoiser, path)
    vq_digest = file_digest(WEIGHTS / "digits_vq.safetensors")
    digest = hashlib.sha256((unet_digest + vq_digest).encode()).hexdigest()
    return latent_model(frozen(denoiser, torch_dtype(dtype), checkpoint), first_stage(), name=name, digest=digest)


def latent_model(denoiser: ClassConditionalUNet, autoencoder: FirstStage, *, name: str, digest: str) -> DiffusionModel:
    """Build the model of a denoiser of `build_latent_unet`, trained or not, on the latents of `autoencoder`."""
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
        blocks=("*resnets.*", "*transformer_blocks.*"),
    )
