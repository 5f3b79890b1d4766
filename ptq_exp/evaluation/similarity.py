"""SSIM of pairs of images, in float64."""

from __future__ import annotations

from typing import overload

import numpy as np
import torch
from torch.nn import functional as F

from ptq_exp.errors import DataError

SSIM_WINDOW = 11
"""Side of the Gaussian window in pixels, and so the smallest side of an image."""
_SIGMA, _K1, _K2 = 1.5, 0.01, 0.03
_BATCH = 64  # images that are in memory as float64 at a time


@overload
def ssim(a: np.ndarray, b: np.ndarray, data_range: float) -> np.ndarray: ...
@overload
def ssim(a: torch.Tensor, b: torch.Tensor, data_range: float) -> torch.Tensor: ...
def ssim(a, b, data_range):
    """Compute the structural similarity of each pair of images (Wang et al. 2004, eq. 13).

    Gaussian window of 11x11 pixels with sigma 1.5, K1 = 0.01, K2 = 0.03, biased variances, each channel on its own;
    the mean over channels and over the positions at which the window lies wholly inside the image.

    Args:
        a, b: [N, C, H, W] of one shape, H and W >= 11; arrays or tensors, of any type.
        data_range: difference between white and black: 255 for uint8, 2 for images in [-1, 1].

    Returns:
        float64 [N] in [-1, 1], 1 where the two images are identical; a tensor where `a` is one.

    Raises:
        DataError: other or different shapes, images smaller than the window, NaN or infinity, data_range <= 0.
    """
    shape, other = tuple(a.shape), tuple(b.shape)
    if shape != other or len(shape) != 4:
        raise DataError(f"ssim compares images [N, C, H, W] one by one, found shapes {shape} and {other}")
    if min(shape[2:]) < SSIM_WINDOW:
        raise DataError(f"SSIM has a window of {SSIM_WINDOW}x{SSIM_WINDOW} pixels, found images of "
                        f"{shape[3]}x{shape[2]}: it is not defined for them")
    if not data_range > 0:
        raise DataError(f"ssim needs data_range > 0, found {data_range}")
    batches = [slice(start, start + _BATCH) for start in range(0, len(a), _BATCH)]
    parts = [_ssim(_double(a[rows]), _double(b[rows]), float(data_range)) for rows in batches]
    values = torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)
    if not torch.isfinite(values).all():
        raise DataError("ssim: NaN or infinity in the images")
    return values if isinstance(a, torch.Tensor) else values.numpy()


def _double(images: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Return a copy of images, which may be mapped read-only from a file, in float64."""
    return images.double() if isinstance(images, torch.Tensor) else torch.from_numpy(np.array(images, np.float64))


def _ssim(x: torch.Tensor, y: torch.Tensor, data_range: float) -> torch.Tensor:
    """Compute SSIM of float64 [n, C, H, W] -> [n]."""
    n = len(x)
    window = torch.exp(-((torch.arange(SSIM_WINDOW, device=x.device) - SSIM_WINDOW // 2).double() ** 2)
                       / (2 * _SIGMA**2))
    window /= window.sum()
    planes = torch.stack([x, y, x * x, y * y, x * y]).reshape(-1, 1, *x.shape[2:])
    means = F.conv2d(F.conv2d(planes, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
    mu_x, mu_y, xx, yy, xy = means.reshape(5, n, -1)
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    luminance = (2 * mu_x * mu_y + c1) / (mu_x**2 + mu_y**2 + c1)
    structure = (2 * (xy - mu_x * mu_y) + c2) / (xx - mu_x**2 + yy - mu_y**2 + c2)
    return (luminance * structure).mean(dim=1)
