"""Loading the reference that scores refer to, whatever the user has of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ptq_exp.errors import DataError
from ptq_exp.evaluation.data import NPZ_IMAGES, open_images
from ptq_exp.evaluation.features import FeatureExtractor, extract_features
from ptq_exp.evaluation.metrics import require_covariance
from ptq_exp.evaluation.statistics import FeatureStatistics, GaussianStatistics, load_statistics, require_sizes
from ptq_exp.storage.npz import npz_keys

# What tells stored statistics from mere images.
_STATISTICS = {"mu", "sigma", "pooled", "spatial", "probabilities"}


def load_reference(
    path: str | os.PathLike,
    extractor: FeatureExtractor,
    *,
    n_max: int | None = None,
    batch_size: int = 64,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    split: str = "train",
    progress: Callable[[int], object] | None = None,
) -> FeatureStatistics | GaussianStatistics:
    """Read the reference at `path`; features of images are extracted, stored statistics are taken as they are.

    Args:
        path: an `.npz` file of the ADM evaluator (images `arr_0`, or `mu`, `sigma`, `mu_s`, `sigma_s`, or all of these:
            then the Gaussians are the stored ones and the images are for precision and recall), of clean-fid (`mu`,
            `sigma`) or of ours; or a folder of images or of CIFAR-10, see `open_images`.
        extractor: for images; stored statistics must be its own, of which only name and size can be checked.
        n_max: at most so many images, evenly spaced; None = all.
        batch_size: images per call of the extractor.
        size, channels, split: of the images, see `open_images`.
        progress: called after each batch with the number of its images.

    Raises:
        DataError: nothing there, a damaged or foreign file (the message names the arrays found), images of another
            size, statistics of another extractor, or with NaN, infinity or a matrix that is no covariance.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"evaluation.reference={path}: no such file or folder")

    def extract() -> FeatureStatistics:
        images = open_images(path, size=size, channels=channels, split=split).take(n_max)
        name = f"{path.name}, {len(images)} images"
        return extract_features(extractor, images, name=name, batch_size=batch_size, progress=progress)

    is_npz = path.is_file() and path.suffix.lower() == ".npz"
    keys = npz_keys(path) if is_npz else [NPZ_IMAGES]
    if not _STATISTICS & set(keys):
        if NPZ_IMAGES not in keys:
            raise DataError(
                f"evaluation.reference={path}: found the arrays {', '.join(keys) or '(none)'}; expected images in "
                f"{NPZ_IMAGES}, or statistics mu and sigma, or a file of our own features"
            )
        return extract()
    statistics = _of_extractor(load_statistics(path), path, extractor)
    if NPZ_IMAGES in keys and isinstance(statistics, GaussianStatistics):
        features = extract()
        return replace(statistics, name=f"{statistics.name}, {len(features)} images", features=features)
    return statistics


def _of_extractor(
    statistics: FeatureStatistics | GaussianStatistics, path: Path, extractor: FeatureExtractor
) -> FeatureStatistics | GaussianStatistics:
    """`statistics` read from `path` with a name, if they may come from `extractor`."""
    statistics = replace(statistics, name=statistics.name or f"{path.name}, stored statistics")
    if statistics.extractor and statistics.extractor != extractor.name:
        raise DataError(
            f"evaluation.reference={path}: made with the extractor {statistics.extractor}, not {extractor.name}"
        )
    require_sizes(statistics, getattr(extractor, "feature_sizes", (None, None)), extractor.name)
    if isinstance(statistics, GaussianStatistics):
        for name, sigma in (("sigma", statistics.sigma), ("sigma_s", statistics.sigma_s)):
            if sigma is not None:
                require_covariance(sigma, f"evaluation.reference={path}: {name}")
    return statistics
