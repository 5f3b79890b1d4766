"""95 % intervals by the paired bootstrap: what is compared is drawn again together, with the same indices.

Percentiles 2.5 and 97.5 of the statistic over resamples (Efron and Tibshirani 1993, section 13.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ptq_exp.errors import DataError

if TYPE_CHECKING:  # torch takes seconds to load
    import torch

    Array = np.ndarray | torch.Tensor | Sequence[float]

RESAMPLES = 10_000
PERCENTILES = (2.5, 97.5)
_AT_ONCE = 1 << 22  # drawn indices in memory at a time

Interval = tuple[float, float]


def paired_bootstrap(
    a: Array, b: Array, resamples: int = RESAMPLES, seed: int = 0, *, prompts: Sequence[object] | None = None
) -> Interval:
    """Compute the 95 % interval of mean(a - b), a and b drawn again with the same indices.

    Args:
        a, b: [N] values of the same N images (prompt and seed) under two models; or [N, K], K seeds of each of N
            prompts, which stay together.
        resamples: of N values each, with replacement.
        seed: of the drawn indices.
        prompts: what each image was drawn from: images of one prompt stay together. None = every image is on its own.

    Returns:
        (low, high): percentiles 2.5 and 97.5 of the means of the resamples.

    Raises:
        DataError: no values, different shapes, NaN or infinity, or fewer than one resample.
    """
    sums, counts = _by_prompt(_differences(a, b), prompts)
    if resamples < 1:
        raise DataError(f"paired_bootstrap needs resamples >= 1, found {resamples}")
    means = [sums[rows].sum(axis=1) / counts[rows].sum(axis=1) for rows in _draws(len(sums), resamples, seed)]
    return percentiles(np.concatenate(means))


def percentiles(statistics: np.ndarray) -> Interval:
    """Return the 95 % interval of a statistic [R] of R resamples."""
    low, high = np.percentile(statistics, PERCENTILES)
    return float(low), float(high)


def resampled_rows(
    n: int, resamples: int, seed: int = 0, *, prompts: Sequence[object] | None = None
) -> Iterator[np.ndarray]:
    """Yield the images of each resample: int64 indices below `n`; images of one prompt come together.

    The resamples are those of `paired_bootstrap` with the same seed.
    """
    groups = _groups(n, prompts)
    for rows in _draws(n if groups is None else len(groups), resamples, seed):
        yield from rows if groups is None else (np.concatenate([groups[i] for i in row]) for row in rows)


def _differences(a: Array, b: Array) -> np.ndarray:
    x, y = (np.asarray(value.detach().cpu() if hasattr(value, "detach") else value, np.float64) for value in (a, b))
    if x.shape != y.shape or x.ndim not in (1, 2) or x.size == 0:
        raise DataError(f"a paired bootstrap needs values [N] or [N, K] of the same images, found shapes {x.shape} and "
                        f"{y.shape}")
    difference = x - y
    if not np.isfinite(difference).all():
        raise DataError(f"{np.sum(~np.isfinite(difference))} of {difference.size} differences are NaN or infinite: "
                        "a mean of them has no interval")
    return difference


def _by_prompt(difference: np.ndarray, prompts: Sequence[object] | None) -> tuple[np.ndarray, np.ndarray]:
    """Return sum and number of the values of each unit that is drawn."""
    if difference.ndim == 2:
        return difference.sum(axis=1), np.full(len(difference), difference.shape[1])
    groups = _groups(len(difference), prompts)
    if groups is None:
        return difference, np.ones(len(difference), int)
    return np.array([difference[group].sum() for group in groups]), np.array([len(group) for group in groups])


def _groups(n: int, prompts: Sequence[object] | None) -> list[np.ndarray] | None:
    """Return the images of each prompt; None where every image is on its own, or all are of the same prompt."""
    if prompts is None:
        return None
    if len(prompts) != n:
        raise DataError(f"{len(prompts)} prompts for {n} images: give one for each")
    found: dict[object, list[int]] = {}
    for i, prompt in enumerate(prompts):
        found.setdefault(prompt, []).append(i)
    if len(found) in (1, n):
        return None
    return [np.array(images) for images in found.values()]


def _draws(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield indices below n, [R, n] for some resamples at a time; they do not depend on how many that are."""
    rng = np.random.default_rng(seed)
    at_once = max(1, _AT_ONCE // n)
    for start in range(0, resamples, at_once):
        yield rng.integers(0, n, (min(at_once, resamples - start), n))
