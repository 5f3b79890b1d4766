"""What scores need of a set of images: its features, or the Gaussians fitted to them; each one file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptq_exp.errors import DataError
from ptq_exp.storage.atomic import write_npz
from ptq_exp.storage.finite import require_finite
from ptq_exp.storage.npz import open_npz, require_arrays

SPATIAL_CHANNELS = 7
"""sFID uses the first seven channels of a mid-level feature map, as the ADM evaluator does."""

_FEATURES = ("pooled", "spatial", "probabilities")
_POOLED_GAUSSIAN, _SPATIAL_GAUSSIAN = ("mu", "sigma"), ("mu_s", "sigma_s")
_LAYOUT = "channels first"
_WHAT = "file of feature statistics"
_AGAIN = "compute the statistics again, or download them again"


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Everything that IS, FID, sFID, precision and recall need of N images under one feature extractor.

    Attributes:
        pooled: [N, D] features of the last pooling layer (FID, precision, recall).
        spatial: [N, K] flattened first channels of a mid-level feature map (sFID).
        probabilities: [N, C] softmax outputs (IS).
        name: which images, for tables and captions.
        extractor: name of the feature extractor; empty if not known.

    Raises:
        DataError: an array is not two-dimensional, or the three disagree about N.
    """

    pooled: np.ndarray
    spatial: np.ndarray
    probabilities: np.ndarray
    name: str = ""
    extractor: str = ""

    def __post_init__(self) -> None:
        shapes = {field: np.shape(getattr(self, field)) for field in _FEATURES}
        two_dimensional = all(len(shape) == 2 for shape in shapes.values())
        if not two_dimensional or len({shape[0] for shape in shapes.values()}) != 1:
            raise DataError(f"features {self.name!r} must be three arrays [N, ...] of one N, found {shapes}")

    def __len__(self) -> int:
        return len(self.pooled)

    @property
    def sizes(self) -> tuple[int, int | None]:
        """D and K."""
        return self.pooled.shape[1], self.spatial.shape[1]

    def save(self, path: str | os.PathLike) -> None:
        """Write to an `.npz` file, atomically."""
        write_npz(path, **_labels(self), **{field: getattr(self, field) for field in _FEATURES})

    @classmethod
    def load(cls, path: str | os.PathLike) -> FeatureStatistics:
        """Read what `save` wrote.

        Raises:
            DataError: the file is missing, truncated, or holds something else, NaN or infinity.
        """
        with open_npz(path, _WHAT) as archive:
            arrays = {field: archive[field] for field in _FEATURES}
            require_arrays(path, arrays, dict.fromkeys(_FEATURES, ("f", 2)))
            require_finite(arrays, path, _AGAIN)
            return _named(path, cls, **arrays, **_read_labels(archive))


@dataclass(frozen=True, eq=False)
class GaussianStatistics:
    """Means and covariances of features, which is what most published references consist of.

    Attributes:
        mu, sigma: [D], [D, D] of the pooled features (FID).
        mu_s, sigma_s: [K], [K, K] of the spatial features (sFID), flattened as `FeatureStatistics.spatial`; or None.
        name, extractor: as in `FeatureStatistics`.
        features: features of real images for precision and recall; possibly of fewer images than the
            Gaussians were fitted to.

    Raises:
        DataError: shapes that do not fit, or one of `mu_s` and `sigma_s` without the other.
    """

    mu: np.ndarray
    sigma: np.ndarray
    mu_s: np.ndarray | None = None
    sigma_s: np.ndarray | None = None
    name: str = ""
    extractor: str = ""
    features: FeatureStatistics | None = None

    def __post_init__(self) -> None:
        for mu, sigma in (_POOLED_GAUSSIAN, _SPATIAL_GAUSSIAN):
            shapes = [None if (x := getattr(self, field)) is None else np.shape(x) for field in (mu, sigma)]
            absent = mu == "mu_s" and shapes == [None, None]
            if not absent and (None in shapes or len(shapes[0]) != 1 or shapes[1] != shapes[0] * 2):
                raise DataError(f"statistics {self.name!r} need {mu} [D] and {sigma} [D, D], found {shapes}")
        if self.features is not None:
            require_same_features(self.features, self)

    @property
    def sizes(self) -> tuple[int, int | None]:
        """D, and K where there are spatial statistics."""
        return len(self.mu), None if self.mu_s is None else len(self.mu_s)

    def save(self, path: str | os.PathLike) -> None:
        """Write to an `.npz` file, atomically."""
        arrays = {field: getattr(self, field) for field in _POOLED_GAUSSIAN + _SPATIAL_GAUSSIAN}
        if self.features is not None:
            arrays |= {field: getattr(self.features, field) for field in _FEATURES}
            arrays["features_name"] = np.array(self.features.name)
        arrays = {field: array for field, array in arrays.items() if array is not None}
        write_npz(path, **_labels(self), layout=np.array(_LAYOUT), **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike) -> GaussianStatistics:
        """Read what `save` wrote, or the `mu`, `sigma` (`mu_s`, `sigma_s`) of the ADM evaluator or of clean-fid.

        The ADM evaluator flattens feature maps with the channel last: its `mu_s` and `sigma_s` are put in our order.

        Raises:
            DataError: the file is missing, truncated, or holds something else, NaN or infinity.
        """
        with open_npz(path, _WHAT) as archive:
            labels = _read_labels(archive)
            arrays = {field: archive[field] for field in _POOLED_GAUSSIAN}
            arrays |= {field: archive[field] for field in _SPATIAL_GAUSSIAN if field in archive.files}
            require_arrays(path, arrays, {field: ("f", 2 if "sigma" in field else 1) for field in arrays})
            require_finite(arrays, path, _AGAIN)
            if "mu_s" in arrays and "layout" not in archive.files:
                order = _channels_first(arrays["mu_s"].size, path)
                arrays["mu_s"] = arrays["mu_s"][order]
                arrays["sigma_s"] = archive["sigma_s"][np.ix_(order, order)]
            if set(_FEATURES) <= set(archive.files):
                name = str(archive["features_name"]) if "features_name" in archive.files else labels["name"]
                features = {field: archive[field] for field in _FEATURES}
                require_finite(features, path, _AGAIN)
                arrays["features"] = FeatureStatistics(**features, name=name, extractor=labels["extractor"])
            return _named(path, cls, **arrays, **labels)


def load_statistics(path: str | os.PathLike) -> FeatureStatistics | GaussianStatistics:
    """Statistics of either kind.

    Raises:
        DataError: the file is missing, truncated, or holds neither; the message names the arrays that were found.
    """
    with open_npz(path, _WHAT) as archive:
        found = archive.files
    if set(_POOLED_GAUSSIAN) <= set(found):
        return GaussianStatistics.load(path)
    if set(_FEATURES) <= set(found):
        return FeatureStatistics.load(path)
    raise DataError(
        f"{path}: found the arrays {', '.join(found) or '(none)'}; expected {', '.join(_FEATURES)} or "
        f"{', '.join(_POOLED_GAUSSIAN)} (and {', '.join(_SPATIAL_GAUSSIAN)})"
    )


def require_same_features(
    first: FeatureStatistics | GaussianStatistics, second: FeatureStatistics | GaussianStatistics
) -> None:
    """Nothing, if both may come from one extractor.

    Raises:
        DataError: the names of their extractors or the sizes of their features differ.
    """
    if first.extractor and second.extractor and first.extractor != second.extractor:
        raise DataError(
            f"{first.name or 'features'} are of the extractor {first.extractor}, {second.name or 'the reference'} of "
            f"{second.extractor}; choose evaluation.reference and evaluation.extractor that belong together"
        )
    require_sizes(second, first.sizes, first.extractor or "the extractor")


def require_sizes(
    statistics: FeatureStatistics | GaussianStatistics, sizes: tuple[int, int | None], extractor: str
) -> None:
    """Nothing, if `statistics` have features of `sizes` (pooled, spatial; None = none).

    Raises:
        DataError: a size differs.
    """
    for kind, found, expected in zip(("pooled", "spatial"), statistics.sizes, sizes, strict=True):
        if None not in (found, expected) and found != expected:
            raise DataError(
                f"{statistics.name or 'the reference'} has {found} {kind} features, {extractor} gives {expected}; "
                "choose an evaluation.reference that was made with this extractor"
            )


def _named(path: str | os.PathLike, make: type, **arguments: Any) -> Any:
    """`make(**arguments)`; what it objects to is said of the file."""
    try:
        return make(**arguments)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _labels(statistics: FeatureStatistics | GaussianStatistics) -> dict[str, np.ndarray]:
    return {"name": np.array(statistics.name), "extractor": np.array(statistics.extractor)}


def _read_labels(archive: np.lib.npyio.NpzFile) -> dict[str, str]:
    """Name and extractor; foreign files have neither, older ones of ours no extractor."""
    return {label: str(archive[label]) if label in archive.files else "" for label in ("name", "extractor")}


def _channels_first(size: int, path: str | os.PathLike) -> np.ndarray:
    """Positions in a flattened [side, side, 7] map, in the order of the flattened [7, side, side] map."""
    side = round((size / SPATIAL_CHANNELS) ** 0.5)
    if side * side * SPATIAL_CHANNELS != size:
        raise DataError(f"{path}: mu_s has {size} values, which is no square map of {SPATIAL_CHANNELS} channels")
    return np.arange(size).reshape(side, side, SPATIAL_CHANNELS).transpose(2, 0, 1).ravel()
