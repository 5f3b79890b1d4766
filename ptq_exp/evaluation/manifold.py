"""Precision and recall of generated images, from the neighbourhoods of their features."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ptq_exp.errors import DataError

Array = np.ndarray | torch.Tensor

# Values in one block of distances: 128 MB of float32, whatever the number of images.
_BLOCK = 2**25


def precision_recall(real: Array, generated: Array, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019) as the evaluator of guided diffusion computes them.

    The manifold of a set is the union of balls around its features, each as large as the distance to the k-th nearest
    other feature of the set. Precision is the share of generated images in the manifold of the real ones,
    recall the share of real images in the manifold of the generated ones. Both depend on the number of images.

    Distances are squared and in float32 (that evaluator: float16 where it suffices, which moves single images across
    the edge of a ball), and computed in blocks: memory does not grow with N1 x N2. Tensors are used on their device.

    Args:
        real: [N1, D] features, N1 > k.
        generated: [N2, D] features, N2 > k.
        k: which neighbour, not counting the image itself.

    Returns:
        (precision, recall), each in [0, 1].

    Raises:
        DataError: not two-dimensional, different D, NaN or infinity, k < 1, no more than k rows.
    """
    if k < 1:
        raise DataError(f"precision_recall needs k >= 1, found {k}")
    real, generated = _as_features(real, "real", k), _as_features(generated, "generated", k)
    if real.shape[1] != generated.shape[1]:
        raise DataError(
            f"real and generated must have the same feature dimension, found {real.shape[1]} and {generated.shape[1]}"
        )
    center = real.mean(dim=0)  # distances do not change, their rounding gets smaller
    real, generated = real - center, generated - center
    real_radii, generated_radii = _radii(real, k), _radii(generated, k)
    real_inside, generated_inside = [], torch.zeros(len(generated), dtype=torch.bool, device=generated.device)
    for rows, distances in _distance_blocks(real, generated):
        real_inside.append((distances <= generated_radii).any(dim=1))
        generated_inside |= (distances <= real_radii[rows, None]).any(dim=0)
    return generated_inside.double().mean().item(), torch.cat(real_inside).double().mean().item()


def _radii(features: torch.Tensor, k: int) -> torch.Tensor:
    """Squared distance of each feature to its k-th nearest other one: [N]."""
    radii = []
    for rows, distances in _distance_blocks(features, features):
        distances[torch.arange(len(distances)), torch.arange(rows.start, rows.stop)] = torch.inf  # to itself
        radii.append(distances.topk(k, dim=1, largest=False).values[:, -1])
    return torch.cat(radii)


def _distance_blocks(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Squared distances [rows, N2] between some rows of `a` and all of `b`."""
    square_a, square_b = a.square().sum(dim=1), b.square().sum(dim=1)
    step = max(1, _BLOCK // len(b))
    for start in range(0, len(a), step):
        rows = slice(start, min(start + step, len(a)))
        distances = torch.addmm(square_b, a[rows], b.T, alpha=-2).add_(square_a[rows, None])
        yield rows, distances.clamp_(min=0)


def _as_features(x: Array, name: str, k: int) -> torch.Tensor:
    x = torch.as_tensor(x).detach()
    if x.ndim != 2 or len(x) <= k:
        raise DataError(f"{name} must be features [N, D] with N > k = {k}, found shape {tuple(x.shape)}")
    if not torch.isfinite(x).all():
        raise DataError(f"{name} of shape {tuple(x.shape)} holds NaN or infinite values")
    return x.float()
