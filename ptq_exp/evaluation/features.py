"""Feature extractors: what a metric needs of images, computed once and shared by all metrics."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ptq_exp.evaluation.reference import FeatureStatistics

SPATIAL_CHANNELS = 7
"""sFID uses the first seven channels of a mid-level feature map, as the ADM evaluator does."""


class FeatureExtractor(Protocol):
    """A named network with its preprocessing.

    `name` and `preprocessing` are part of every metric's specification. Calling it with images uint8 [N, H, W, C]
    gives (pooled [N, D], map [N, K, H', W'] with K >= 7, logits [N, classes]), float32 arrays.
    """

    name: str
    preprocessing: str

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...


def extract_features(
    extractor: FeatureExtractor, images: np.ndarray, *, name: str = "", batch_size: int = 256
) -> FeatureStatistics:
    """Features of `images` (uint8 [N, H, W, C]): pooled, flattened first channels of the map, class probabilities."""
    batches = [extractor(images[i : i + batch_size]) for i in range(0, len(images), batch_size)]
    pooled, maps, logits = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    spatial = maps[:, :SPATIAL_CHANNELS].reshape(len(maps), -1)
    return FeatureStatistics(pooled, spatial, _softmax(logits), name=name)


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)
