"""Feature extractors: what a metric needs of images, computed once and shared by all metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
from scipy.special import softmax

from ptq_exp.errors import DataError
from ptq_exp.evaluation.image_source import ImageSource
from ptq_exp.evaluation.statistics import SPATIAL_CHANNELS, FeatureStatistics
from ptq_exp.storage.finite import is_finite


class FeatureExtractor(Protocol):
    """A named network with its preprocessing.

    `name` and `preprocessing` are part of every metric's specification. Calling it with images uint8 [N, H, W, C]
    gives (pooled [N, D], map [N, K, H', W'] with K >= 7, logits [N, classes]), float32 arrays.

    An extractor may also declare `feature_sizes`: D and 7 H' W'. Stored statistics of another size are
    then refused when they are loaded, otherwise when they are first compared.
    """

    name: str
    preprocessing: str

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...


def extract_features(
    extractor: FeatureExtractor,
    images: np.ndarray | ImageSource,
    *,
    name: str = "",
    batch_size: int = 256,
    progress: Callable[[int], object] | None = None,
) -> FeatureStatistics:
    """Features of `images`: pooled, flattened first channels of the map, class probabilities.

    Args:
        extractor: gives the features.
        images: uint8 [N, H, W, C], an array or anything with a length whose slices are such arrays; one batch at a
            time is read.
        name: which images these are.
        batch_size: images per call of the extractor.
        progress: called after each batch with the number of its images.

    Returns:
        Features whose `spatial` [N, 7 H' W'] runs through the channels of the map first, then its rows.

    Raises:
        DataError: no images, or the extractor gives NaN or infinity.
    """
    if len(images) == 0:
        raise DataError(f"no images to extract features from {name}".rstrip())
    batches = []
    for start in range(0, len(images), batch_size):
        with in_float32():
            pooled, maps, logits = extractor(images[start : start + batch_size])
        _require_finite(extractor, name, start, pooled, maps, logits)
        spatial = np.ascontiguousarray(maps[:, :SPATIAL_CHANNELS]).reshape(len(maps), -1)  # the rest may go
        batches.append((pooled, spatial, softmax(logits.astype(np.float64), axis=1)))
        if progress is not None:
            progress(len(pooled))
    arrays = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return FeatureStatistics(*arrays, name=name, extractor=getattr(extractor, "name", ""))


@contextmanager
def in_float32() -> Iterator[None]:
    """Inside, networks that judge images compute in the type of their weights, whatever autocast holds outside."""
    import torch  # scores that are read from files need none

    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def _require_finite(extractor: FeatureExtractor, name: str, start: int, *found: np.ndarray) -> None:
    """Raise DataError for features that are NaN or infinite; the message names extractor and image."""
    for what, values in zip(("features", "feature map", "logits"), map(np.asarray, found), strict=True):
        if not is_finite(values):
            bad = ~np.isfinite(values).reshape(len(values), -1).all(1)
            shown = getattr(extractor, "name", type(extractor).__name__)
            raise DataError(
                f"evaluation.extractor={shown}: gives NaN or infinity in "
                f"the {what} of image {start + int(bad.argmax())} of {name or 'the images'}; check its weights"
            )
