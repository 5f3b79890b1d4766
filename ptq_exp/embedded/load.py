"""The embedded model and feature extractor, loaded from the weights inside the package."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ptq_exp.diffusion.model import DiffusionModel, UNetDenoiser
from ptq_exp.embedded.digits import IMAGE_SIZE, digits
from ptq_exp.embedded.networks import BETA_SCHEDULE, TRAIN_STEPS, DigitsClassifier, build_unet
from ptq_exp.errors import CheckpointError
from ptq_exp.evaluation.images import from_uint8, to_uint8

WEIGHTS = Path(__file__).parent / "weights"


def card(name: str) -> dict:
    """How the weights `name` (`digits_unet`, `digits_classifier`) were trained, and how good they are."""
    return json.loads((WEIGHTS / f"{name}.json").read_text())


def _load_weights(network: nn.Module, path: Path) -> str:
    """Fill `network` strictly from a safetensors file; returns the file's SHA-256.

    Raises:
        CheckpointError: the file is missing, is no safetensors file, or has other keys or shapes than the network.
    """
    try:
        network.load_state_dict(load_file(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"model.checkpoint={path}: no such file") from error
    except OSError as error:
        raise CheckpointError(f"model.checkpoint={path}: not a readable file ({error})") from error
    except SafetensorError as error:
        raise CheckpointError(f"model.checkpoint={path}: not a complete safetensors file ({error})") from error
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()[:200]
        raise CheckpointError(f"model.checkpoint={path}: weights of another network ({reason})") from error
    network.eval().requires_grad_(False)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digits_model(name: str = "digits", checkpoint: str | None = None) -> DiffusionModel:
    """The embedded pixel model: 16x16 one-channel digits, 1000-step cosine schedule, 1.6 M parameters.

    Args:
        name: what tables call it.
        checkpoint: a safetensors file of `ptq_exp.train_embedded`; None = the weights inside the package.

    Raises:
        CheckpointError: see the message; the file is missing, truncated, or of another network.
    """
    unet = build_unet()
    digest = _load_weights(unet, Path(checkpoint) if checkpoint else WEIGHTS / "digits_unet.safetensors")
    schedule = DDIMScheduler(TRAIN_STEPS, beta_schedule=BETA_SCHEDULE).alphas_cumprod
    return DiffusionModel(
        name=name,
        denoiser=UNetDenoiser(unet).eval(),
        alphas_cumprod=schedule.double(),
        sample_shape=(1, IMAGE_SIZE, IMAGE_SIZE),
        clip_sample=True,
        digest=digest,
    )


def digits_reference() -> np.ndarray:
    """All real digits as scored images: uint8 [1797, 16, 16, 1]."""
    return to_uint8(digits().images)


class DigitsExtractor:
    """The embedded classifier as a feature extractor: pooled 64, map 64 x 4 x 4, 10 logits."""

    preprocessing = "uint8 / 127.5 - 1, no resizing"

    def __init__(self) -> None:
        self.network = DigitsClassifier()
        self.name = f"digits-{_load_weights(self.network, WEIGHTS / 'digits_classifier.safetensors')[:8]}"

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `ptq_exp.evaluation.features.FeatureExtractor`."""
        features = self.network(from_uint8(images))
        return features.pooled.numpy(), features.spatial.numpy(), features.logits.numpy()
