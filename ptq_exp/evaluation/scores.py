"""`SCORES`: every number that judges images, how it is shown, and how it is computed from features.

A score is added by one entry of `SCORES` with a function of a `Comparison` or of `Pairs`: results.json, the summary of
a run, its model card, report and W&B run, the tables, the search and the gate know what stands there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ptq_exp.errors import DataError
from ptq_exp.evaluation.kernel import kernel_distance
from ptq_exp.evaluation.metrics import (
    frechet_distance,
    frechet_distance_from_features,
    inception_score,
    mean_and_covariance,
)
from ptq_exp.evaluation.pairs import Pairs, clip_scores, lpips_values, psnr_values, ssim_values
from ptq_exp.evaluation.prompts import prompt_accuracy
from ptq_exp.evaluation.resampled import OfRows, fid_of_rows, sfid_of_rows
from ptq_exp.evaluation.statistics import FeatureStatistics, GaussianStatistics, require_same_features

__all__ = ["SCORES", "Comparison", "Score", "half_split_fid", "score", "shown"]

HEADLINE, SUMMARY, DETAIL = 1, 2, 3
"""Where a score is shown: in tables of many runs, too; in the summary of a run, too; in its report and card alone."""
_NEIGHBOUR = 3


@dataclass(frozen=True)
class Comparison:
    """Features of generated images beside what is known of the real ones.

    Attributes:
        asked: [N] the class that was asked for in each generated image; None where nothing names one.
    """

    generated: FeatureStatistics
    reference: FeatureStatistics | GaussianStatistics
    asked: Sequence[int] | None = None

    @property
    def real(self) -> FeatureStatistics | None:
        """Features of real images; None where only Gaussians of them are known."""
        return self.reference if isinstance(self.reference, FeatureStatistics) else self.reference.features

    @cached_property
    def precision_recall(self) -> tuple[float, float] | tuple[None, None]:
        """Both at once; None without features of real images, or with no more than 3 images on a side."""
        if self.real is None or min(len(self.real), len(self.generated)) <= _NEIGHBOUR:
            return None, None
        from ptq_exp.evaluation.manifold import precision_recall  # torch takes seconds to load

        return precision_recall(self.real.pooled, self.generated.pooled, _NEIGHBOUR)


def fid(images: Comparison) -> float:
    """Fréchet distance of the pooled features, by the stored Gaussian where the reference has one."""
    real = images.reference
    if isinstance(real, FeatureStatistics):
        return frechet_distance_from_features(images.generated.pooled, real.pooled)
    # the reference first: the route through its Cholesky factor needs it to be of full rank, which it usually is
    return frechet_distance(real.mu, real.sigma, *mean_and_covariance(images.generated.pooled))


def sfid(images: Comparison) -> float | None:
    """Fréchet distance of the spatial features; None where the reference has none."""
    real = images.reference
    if isinstance(real, FeatureStatistics):
        return frechet_distance_from_features(images.generated.spatial, real.spatial)
    if real.mu_s is None:
        return None
    return frechet_distance(real.mu_s, real.sigma_s, *mean_and_covariance(images.generated.spatial))


def kid(images: Comparison) -> float | None:
    """Kernel distance of the pooled features; None without features of real images, or with one image on a side."""
    if images.real is None or min(len(images.real), len(images.generated)) < 2:
        return None
    return kernel_distance(images.generated.pooled, images.real.pooled)


def asked_classes(images: Comparison) -> float | None:
    """Share of images that the classifier reads as the class asked for; None where nothing names one."""
    return None if images.asked is None else prompt_accuracy(images.generated, images.asked)


@dataclass(frozen=True)
class Score:
    """A number that judges generated images.

    Attributes:
        heading: of its column in tables.
        better: 1 where higher is better, -1 where lower is.
        digits: after the decimal point.
        function: computes it, or returns None where the images do not allow it; None for what a run measures itself.
        description: what it is, for the model card; "" = the heading.
        level: `HEADLINE`, `SUMMARY` or `DETAIL`.
        percent: heading of the same number in percent, "" where nobody reads it so.
        pair: computes the value of each pair of images [N], whose mean the score is.
        alone: `pair` looks at the quantized image alone: full-precision images have this score, too.
        to_full_precision: computes it from features, with the full-precision images in place of the real ones.
        change_of: the score is this one minus that of the full-precision images of the same seeds; "" = it is none.
        of_rows: makes the function that computes it of drawn rows of the features, faster than `function` of each
            resample would; None where there is no such way.
        needs: the setting without which it is not measured; "" = none of its own.
    """

    heading: str
    better: int
    digits: int = 2
    function: Callable[[Comparison], float | None] | None = None
    description: str = ""
    level: int = SUMMARY
    percent: str = ""
    pair: Callable[[Pairs], np.ndarray] | None = None
    alone: bool = False
    to_full_precision: Callable[[Comparison], float | None] | None = None
    change_of: str = ""
    of_rows: Callable[[FeatureStatistics, FeatureStatistics | GaussianStatistics], OfRows] | None = None
    needs: str = ""


SCORES: dict[str, Score] = {
    "fid": Score("FID", -1, function=fid, level=HEADLINE, of_rows=fid_of_rows),
    "sfid": Score("sFID", -1, function=sfid, level=HEADLINE, of_rows=sfid_of_rows),
    "is": Score("IS", 1, function=lambda images: inception_score(images.generated.probabilities), level=HEADLINE),
    "kid": Score("KID", -1, 4, kid),
    "precision": Score("precision", 1, 3, lambda images: images.precision_recall[0]),
    "recall": Score("recall", 1, 3, lambda images: images.precision_recall[1]),
    "prompt_accuracy": Score(
        "prompt accuracy", 1, 4, asked_classes, "share of images that show the class asked for", SUMMARY,
        "prompt accuracy %",
    ),
    "fid_increase": Score(
        "FID − FP32", -1, description="FID increase over full precision, same seeds", level=DETAIL, change_of="fid",
    ),
    "sfid_increase": Score(
        "sFID − FP32", -1, description="sFID increase over full precision, same seeds", level=DETAIL, change_of="sfid",
    ),
    "is_increase": Score(
        "IS − FP32", 1, description="IS increase over full precision, same seeds", level=DETAIL, change_of="is",
    ),
    "fid_increase_units": Score(
        "FID increase", -1, level=HEADLINE,
        description="the same in units of the FID between two random halves of the real data",
    ),
    "psnr": Score(
        "PSNR dB", 1, level=HEADLINE, description="PSNR to full precision, same seeds (dB)", pair=psnr_values
    ),
    "ssim": Score(
        "SSIM", 1, 4, level=HEADLINE, description="SSIM to full precision, same seeds", pair=ssim_values,
        needs="evaluation.pairs=[ssim]",
    ),
    "lpips": Score(
        "LPIPS", -1, 4, level=HEADLINE, description="LPIPS to full precision, same seeds", pair=lpips_values,
        needs="evaluation.lpips=PATH",
    ),
    "clip_score": Score(
        "CLIP score", 1, level=HEADLINE, description="CLIP score, 100 max(cos, 0) of image and prompt",
        pair=clip_scores, alone=True, needs="evaluation.clip=PATH",
    ),
    "clip_score_change": Score(
        "CLIP score − FP32", 1, 3, description="CLIP score minus that of full precision, same seeds", level=DETAIL,
        change_of="clip_score",
    ),
    "fid_to_fp": Score(
        "FID to FP32", -1, 3, level=HEADLINE, description="FID between these and the full-precision images of the same "
        "seeds", to_full_precision=fid, needs="evaluation.pairs=[fid_to_fp]",
    ),
    "eps_error": Score(
        "eps error", -1, 4, level=HEADLINE, percent="eps error %",
        description="relative error of the noise estimate, mean over steps",
    ),
    "eps_error_without_last": Score(
        "eps error, not last", -1, 4, level=DETAIL, percent="eps error %, not last",
        description="the same without the last step",
    ),
    "fixed_pattern_share": Score(
        "fixed pattern", -1, level=DETAIL,
        description="share of this error that is the same for all samples, mean over steps",
    ),
}
"""Key in results.json -> score, in the order in which scores are shown."""


def shown(level: int) -> dict[str, Score]:
    """Return the scores of `SCORES` up to a `level`: few (`HEADLINE`), or all of them (`DETAIL`)."""
    return {name: score for name, score in SCORES.items() if score.level <= level}


def score(
    generated: FeatureStatistics,
    reference: FeatureStatistics | GaussianStatistics,
    asked: Sequence[int] | None = None,
) -> dict[str, float]:
    """Compute every score of `SCORES` that features allow, of generated images against real ones.

    Stored Gaussians are used for FID and sFID where the reference has them, its features for KID, precision and
    recall, as the evaluator of guided diffusion does. IS does not depend on the reference.

    Args:
        generated: features of the generated images.
        reference: features or Gaussians of the real images, from the same extractor.
        asked: [N] the class asked for in each generated image, numbered as the extractor's classifier numbers them.

    Returns:
        {"fid", "is"} and, where the reference has what they need, {"sfid"}, {"kid"} and {"precision", "recall"};
        with `asked`, {"prompt_accuracy"}.

    Raises:
        DataError: not one class per image, or the two come from different extractors, or hold NaN or infinity.
    """
    require_same_features(generated, reference)
    images = Comparison(generated, reference, asked)
    values = {name: entry.function(images) for name, entry in SCORES.items() if entry.function is not None}
    return {name: value for name, value in values.items() if value is not None}


def half_split_fid(features: np.ndarray, seeds: Iterable[int] = range(10)) -> float:
    """Compute the mean Fréchet distance between two random halves of the real data: the unit of the paired increase.

    FID moves by tens of percent between seeds at a few hundred samples; the difference between a quantized
    model and the full-precision one drawn from the same noise does not. Divided by this unit it can be
    compared between data sets and extractors.

    Args:
        features: [N, D] features of the real data, N >= 4; with odd N one row is left out of each split.
        seeds: one random split per seed.

    Raises:
        DataError: fewer than 4 rows, or no seeds.
    """
    features, seeds = np.asarray(features), list(seeds)
    half = len(features) // 2
    if half < 2 or not seeds:
        raise DataError(f"half splits need >= 4 rows and >= 1 seed, found {len(features)} and {len(seeds)}")
    distances = []
    for seed in seeds:
        order = np.random.default_rng(seed).permutation(len(features))
        first, second = features[order[:half]], features[order[half : 2 * half]]
        distances.append(frechet_distance_from_features(first, second))
    return float(np.mean(distances))
