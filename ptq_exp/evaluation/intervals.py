"""95 % intervals of scores: of means over pairs, and of scores that are no means, computed anew on each resample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
from threadpoolctl import threadpool_limits

from ptq_exp.evaluation.bootstrap import Interval, paired_bootstrap, percentiles, resampled_rows
from ptq_exp.evaluation.resampled import OfRows, Reference
from ptq_exp.evaluation.scores import SCORES, Comparison
from ptq_exp.evaluation.statistics import FeatureStatistics

_MANY_FEATURES = 512
"""Columns from which on several threads make the decomposition of a covariance faster."""


def pair_interval(
    values: np.ndarray, fp_values: np.ndarray | None = None, *, resamples: int, prompts: Sequence[object] | None = None
) -> Interval:
    """Compute the interval of the mean of a score of pairs [N], or of its mean difference to full precision."""
    return paired_bootstrap(values, np.zeros(len(values)) if fp_values is None else fp_values, resamples,
                            prompts=prompts)


def change_intervals(
    generated: FeatureStatistics, full_precision: FeatureStatistics, reference: Reference | None,
    estimates: Mapping[str, float], *, resamples: int, prompts: Sequence[object] | None = None,
) -> dict[str, Interval]:
    """Compute the intervals of scores that are no means: changes of FID, sFID and IS, FID to full precision.

    Both sets of images are drawn again with the same indices. An image that is drawn twice makes a Fréchet distance
    larger, in each resample: the resampled values are moved by one constant, so that their mean is the estimate.

    Args:
        generated, full_precision: features of the images, of the same seeds.
        reference: what both are scored against; None = nothing.
        estimates: the scores of all images; those that are here have an interval.
        resamples: number of resamples; 0 = no intervals.
        prompts: see `paired_bootstrap`.

    Returns:
        {score: (low, high)}.
    """
    changes = [name for name, score in SCORES.items() if name in estimates and _of_features(score.change_of)]
    between = [name for name, score in SCORES.items() if name in estimates and score.to_full_precision is not None]
    if not resamples or not (changes or between):
        return {}
    found: dict[str, list[float]] = {name: [] for name in (*changes, *between)}
    # one thread for the linear algebra of small matrices: several would wait for each other most of the time
    with threadpool_limits(1, "blas") if max(generated.sizes) < _MANY_FEATURES else nullcontext():
        of_both = {name: [_of_rows(SCORES[name].change_of, side, reference) for side in (generated, full_precision)]
                   for name in changes}
        for rows in resampled_rows(len(generated), resamples, prompts=prompts):
            for name, (ours, theirs) in of_both.items():
                found[name].append(ours(rows) - theirs(rows))
            for name in between:
                images = Comparison(_drawn(generated, rows), _drawn(full_precision, rows))
                found[name].append(SCORES[name].to_full_precision(images))
    return {name: _around(estimates[name], np.array(values), 0.0 if name in between else None)
            for name, values in found.items()}


def scaled(interval: Interval, unit: float) -> Interval:
    """Return the interval of a score that is divided by `unit`."""
    return interval[0] / unit, interval[1] / unit


def _of_features(name: str) -> bool:
    return name in SCORES and SCORES[name].function is not None


def _around(estimate: float, resampled: np.ndarray, least: float | None) -> Interval:
    """Return percentiles of the resampled values, moved so that their mean is the estimate."""
    low, high = percentiles(resampled - resampled.mean() + estimate)
    return (low, high) if least is None else (max(low, least), max(high, least))


def _of_rows(name: str, features: FeatureStatistics, reference: Reference | None) -> OfRows:
    """Return the function that computes a score of drawn rows of `features`."""
    score = SCORES[name]
    if score.of_rows is not None:
        return score.of_rows(features, reference)
    return lambda rows: score.function(Comparison(_drawn(features, rows), reference))


def _drawn(features: FeatureStatistics, rows: np.ndarray) -> FeatureStatistics:
    return replace(features, pooled=features.pooled[rows], spatial=features.spatial[rows],
                   probabilities=features.probabilities[rows])
