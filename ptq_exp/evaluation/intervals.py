"""95 % intervals of scores: of means over pairs, and of scores that are no means, computed anew on each resample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ptq_exp.evaluation.bootstrap import Interval, paired_bootstrap, percentiles, resampled_rows
from ptq_exp.evaluation.metrics import mean_and_covariance
from ptq_exp.evaluation.scores import SCORES, Comparison
from ptq_exp.evaluation.statistics import FeatureStatistics, GaussianStatistics

Reference = FeatureStatistics | GaussianStatistics


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
    reference = None if reference is None else _summed_up(reference)
    found: dict[str, list[float]] = {name: [] for name in (*changes, *between)}
    for rows in resampled_rows(len(generated), resamples, prompts=prompts):
        ours, theirs = _drawn(generated, rows), _drawn(full_precision, rows)
        for name in changes:
            function = SCORES[SCORES[name].change_of].function
            found[name].append(function(Comparison(ours, reference)) - function(Comparison(theirs, reference)))
        for name in between:
            found[name].append(SCORES[name].to_full_precision(Comparison(ours, theirs)))
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


def _drawn(features: FeatureStatistics, rows: np.ndarray) -> FeatureStatistics:
    return replace(features, pooled=features.pooled[rows], spatial=features.spatial[rows],
                   probabilities=features.probabilities[rows])


def _summed_up(reference: Reference) -> Reference:
    """Return the Gaussians of a reference of many images, which do not change between resamples."""
    if isinstance(reference, GaussianStatistics) or len(reference) <= max(reference.sizes):
        return reference
    mu, sigma = mean_and_covariance(reference.pooled)
    mu_s, sigma_s = mean_and_covariance(reference.spatial)
    return GaussianStatistics(mu, sigma, mu_s, sigma_s, name=reference.name, extractor=reference.extractor)
