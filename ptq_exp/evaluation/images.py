"""Images between the network's [-1, 1] and uint8, the PSNR of two sets, and the picture that shows both."""

from __future__ import annotations

import numpy as np
import torch

from ptq_exp.errors import DataError

_WHITE = 255
_PSNR_BATCH = 256  # images that are in memory as float64 at a time


def to_uint8(x: torch.Tensor | np.ndarray) -> np.ndarray:
    """Float images [N, C, H, W] in [-1, 1] -> uint8 [N, H, W, C]: -1 -> 0, 1 -> 255, rounded, clamped.

    C is 1 or 3. Values outside [-1, 1] are clamped: a sampler that does not clip x0 leaves them.

    Raises:
        DataError: not float, not [N, 1 or 3, H, W], NaN or infinity (the sampler diverged).
    """
    x = torch.as_tensor(x).detach().cpu()
    if not x.is_floating_point():
        raise DataError(f"to_uint8 expects float images in [-1, 1], found {x.dtype}")
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise DataError(f"to_uint8 expects images [N, 1 or 3, H, W], found shape {tuple(x.shape)}")
    if not torch.isfinite(x).all():
        bad = (~torch.isfinite(x)).flatten(1).any(dim=1).nonzero().flatten().tolist()
        raise DataError(f"NaN or infinity in {len(bad)} of {len(x)} images, the first is image {bad[0]}")
    levels = (x.to(torch.float64).clamp(-1, 1) + 1) * 127.5
    return levels.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def from_uint8(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, C] -> float32 [N, C, H, W] in [-1, 1]; `to_uint8` of the result gives `images` back.

    Raises:
        DataError: not uint8 or not [N, H, W, 1 or 3].
    """
    images = as_images(images, "images")
    return torch.tensor(images).permute(0, 3, 1, 2).to(torch.float32).div(127.5).sub(1).contiguous()


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each pair of images, in dB: 10 log10(255^2 / MSE).

    Args:
        a, b: uint8 [N, H, W, C] of one shape.

    Returns:
        float64 [N]; infinity where the two images are identical.

    Raises:
        DataError: not uint8 [N, H, W, 1 or 3], or different shapes.
    """
    a, b = as_images(a, "a"), as_images(b, "b")
    if a.shape != b.shape:
        raise DataError(f"psnr compares image by image: shapes {a.shape} and {b.shape} differ")
    squared = (a.astype(np.float64) - b) ** 2
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255.0**2 / squared.mean(axis=(1, 2, 3)))


def mean_psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over images of `capped_psnr` in dB.

    Raises:
        DataError: as `psnr`, or no images.
    """
    return float(capped_psnr(a, b).mean())


def capped_psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute `psnr` of each pair, float64 [N] in dB, identical pairs counted at the cap.

    The cap is the largest finite PSNR that two images of this size can have: one of their H*W*C values off by
    one level, 10 log10(255^2 H W C) (72.2 dB at 16x16x1, 83.0 dB at 32x32x3). It keeps the mean finite and
    ranks an identical pair no worse than any other.

    Raises:
        DataError: as `psnr`, or no images.
    """
    if np.shape(a) != np.shape(b) or len(a) == 0:
        psnr(a, b)  # says what is wrong with the shapes
        raise DataError("the mean PSNR needs at least one pair of images, found none")
    batches = [slice(start, start + _PSNR_BATCH) for start in range(0, len(a), _PSNR_BATCH)]
    values = np.concatenate([psnr(a[rows], b[rows]) for rows in batches])
    cap = 10 * np.log10(255.0**2 * np.prod(np.shape(a)[1:]))
    return np.minimum(values, cap)


def image_grid(
    fp_images: np.ndarray, q_images: np.ndarray, columns: int = 8, *, tile: int = 64, padding: int = 4
) -> np.ndarray:
    """One picture: each row of full-precision images stands over the quantized images of the same seeds.

    Args:
        fp_images, q_images: uint8 [N, H, W, C] of one shape, image i of both from the same seed.
        columns: images per row; N = 12 and 8 columns give the rows FP, Q, FP, Q with 4 empty places each.
        tile: images smaller than this many pixels are enlarged by a whole factor, without interpolation.
        padding: white pixels around every image.

    Returns:
        uint8 [rows * (H' + padding) + padding, columns * (W' + padding) + padding, 3].

    Raises:
        DataError: as `psnr`, or no images, or columns < 1.
    """
    fp_images, q_images = as_images(fp_images, "fp_images"), as_images(q_images, "q_images")
    if fp_images.shape != q_images.shape or len(fp_images) == 0:
        raise DataError(f"image_grid needs N >= 1 pairs, found shapes {fp_images.shape} and {q_images.shape}")
    if columns < 1:
        raise DataError(f"image_grid needs columns >= 1, found {columns}")
    columns = min(columns, len(fp_images))
    factor = max(1, -(-tile // max(fp_images.shape[1:3])))
    rows = []
    for start in range(0, len(fp_images), columns):
        for images in (fp_images, q_images):
            rows.append(_row(images[start : start + columns], columns, factor, padding))
    edge = np.full((padding, rows[0].shape[1], 3), _WHITE, np.uint8)
    return np.concatenate([edge, *rows])


def side_by_side(fp_image: np.ndarray, q_image: np.ndarray, *, tile: int = 96, padding: int = 4) -> np.ndarray:
    """One picture of a pair uint8 [H, W, C]: full precision left, quantized right, enlarged as in `image_grid`.

    Returns:
        uint8 [H' + 2 padding, 2 (W' + padding) + padding, 3].

    Raises:
        DataError: as `psnr`.
    """
    pair = as_images(np.stack([fp_image, q_image]), "the pair")
    row = _row(pair, 2, max(1, -(-tile // max(pair.shape[1:3]))), padding)
    return np.concatenate([np.full((padding, row.shape[1], 3), _WHITE, np.uint8), row])


def _row(images: np.ndarray, columns: int, factor: int, padding: int) -> np.ndarray:
    """Images side by side, enlarged, white to their left, right and below: uint8 [H' + padding, W', 3]."""
    _, height, width, _ = images.shape
    height, width = height * factor, width * factor
    row = np.full((height + padding, columns * (width + padding) + padding, 3), _WHITE, np.uint8)
    for i, image in enumerate(images):
        left = padding + i * (width + padding)
        row[:height, left : left + width] = image.repeat(factor, axis=0).repeat(factor, axis=1)
    return row


def as_images(images: np.ndarray, name: str) -> np.ndarray:
    """Return uint8 images [N, H, W, 1 or 3]; anything else is a DataError that begins with `name`."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise DataError(
            f"{name} must be uint8 [N, H, W, 1 or 3], found {images.dtype} of shape {images.shape}; "
            "use to_uint8 for network outputs"
        )
    return images
