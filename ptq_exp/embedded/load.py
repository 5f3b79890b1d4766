"""The embedded model and feature extractor, loaded from the weights inside the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch.nn import functional as F

from ptq_exp.diffusion import DiffusionModel, NoiseSchedule, UNetDenoiser
from ptq_exp.diffusion.zoo.build import frozen, torch_dtype
from ptq_exp.embedded.digits import IMAGE_SIZE, LATENT_IMAGE_SIZE, digits
from ptq_exp.embedded.networks import BETA_SCHEDULE, TRAIN_STEPS, DigitsClassifier, build_unet
from ptq_exp.embedded.weights_file import WEIGHTS, load_weights
from ptq_exp.errors import CheckpointError, DataError
from ptq_exp.evaluation.images import from_uint8, to_uint8


def digits_model(name: str = "digits", checkpoint: str | None = None, dtype: str = "float32") -> DiffusionModel:
    """Load the embedded pixel model: 16x16 one-channel digits, 1000-step cosine schedule, 1.6 M parameters.

    Args:
        name: what tables call it.
        checkpoint: a safetensors file of `python -m ptq_exp train_embedded`; None = the weights inside the package.
        dtype: of the denoiser.

    Raises:
        CheckpointError: see the message; the file is missing, truncated, or of another network.
    """
    unet = build_unet()
    digest = load_weights(unet, Path(checkpoint) if checkpoint else WEIGHTS / "digits_unet.safetensors")
    schedule = DDIMScheduler(TRAIN_STEPS, beta_schedule=BETA_SCHEDULE).alphas_cumprod
    return DiffusionModel(
        name=name,
        denoiser=frozen(UNetDenoiser(unet), torch_dtype(dtype), checkpoint),
        schedule=NoiseSchedule(schedule.double()),
        sample_shape=(1, IMAGE_SIZE, IMAGE_SIZE),
        clip_sample=True,
        digest=digest,
    )


def pipeline_folder(name: str) -> Path:
    """Return the folder of an embedded pipeline, digits_text or digits_flow: a plain `diffusers` folder.

    Raises:
        CheckpointError: no such pipeline, or its folder is not there.
    """
    known = sorted(path.parent.name for path in WEIGHTS.glob("*/model_index.json"))
    if name not in known:
        raise CheckpointError(
            f"{name!r} is no embedded pipeline: choose {' or '.join(known)}, or make it by "
            f"python -m ptq_exp train_embedded {name}"
        )
    return WEIGHTS / name


def digits_reference(size: int = IMAGE_SIZE) -> np.ndarray:
    """Return all real digits as scored images: uint8 [1797, size, size, 1]."""
    return to_uint8(digits(size=size).images)


class DigitsExtractor:
    """The embedded classifier as a feature extractor: pooled 64, map 64 x 4 x 4, 10 logits."""

    preprocessing = f"uint8 / 127.5 - 1, area average to {IMAGE_SIZE}x{IMAGE_SIZE}"
    feature_sizes = (64, 112)

    def __init__(self) -> None:
        self.network = DigitsClassifier()
        self.name = f"digits-{load_weights(self.network, WEIGHTS / 'digits_classifier.safetensors')[:8]}"

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `ptq_exp.evaluation.features.FeatureExtractor`; images of 16x16 are not resized.

        Raises:
            DataError: neither digits of 16x16 nor of 32x32.
        """
        if images.shape[1:] not in [(size, size, 1) for size in (IMAGE_SIZE, LATENT_IMAGE_SIZE)]:
            raise DataError(
                f"evaluation=digits scores digits of 16x16x1 or 32x32x1, found images of {images.shape[1:]}: choose "
                "evaluation=adm, clean or paired"
            )
        pixels = from_uint8(images)
        if pixels.shape[-1] != IMAGE_SIZE:
            pixels = F.interpolate(pixels, size=IMAGE_SIZE, mode="area")
        features = self.network(pixels)
        return features.pooled.numpy(), features.spatial.numpy(), features.logits.numpy()
