"""The embedded data set: scikit-learn's bundled handwritten digits as one-channel images.

1,797 real scans of 8x8 pixels with 17 grey levels (Alpaydin and Kaynak, "Optical Recognition of Handwritten
Digits", UCI 1998; the copy that `sklearn.datasets.load_digits` ships), resized to 16x16 for the pixel model and
to 32x32 for the latent model. Nothing is downloaded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

IMAGE_SIZE = 16
LATENT_IMAGE_SIZE = 32
N_CLASSES = 10
HELD_OUT_EVERY = 5


class Digits(NamedTuple):
    """`images` float32 [N, 1, size, size] in [-1, 1] and `labels` int64 [N] in 0..9."""

    images: Tensor
    labels: Tensor


def digits(split: str = "all", size: int = IMAGE_SIZE) -> Digits:
    """Return the digits of `split`: `all` (1,797), `train` (four fifths) or `held_out` (every fifth scan).

    `size` is their width and height in pixels: 16 for the pixel model, 32 for the latent one.

    The scans are resized with bicubic interpolation and clamped, so that ink stays 1 and paper -1.

    Raises:
        ValueError: `split` is none of the three.
    """
    bunch = load_digits()
    scans = torch.from_numpy(bunch.images).float()[:, None] / 8.0 - 1.0
    images = F.interpolate(scans, size=size, mode="bicubic", align_corners=False).clamp(-1.0, 1.0)
    labels = torch.from_numpy(bunch.target).long()
    held_out = torch.arange(len(labels)) % HELD_OUT_EVERY == 0
    chosen = {"all": torch.ones_like(held_out), "train": ~held_out, "held_out": held_out}
    if split not in chosen:
        raise ValueError(f"split={split!r}: choose one of {', '.join(chosen)}")
    return Digits(images[chosen[split]], labels[chosen[split]])
