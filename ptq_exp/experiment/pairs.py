"""The stage that compares images pair by pair with those of full precision, and gives scores their intervals."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from ptq_exp.errors import ConfigError
from ptq_exp.evaluation import ImageText, Pairs, Perceptual, change_intervals, pair_interval
from ptq_exp.evaluation.scores import SCORES, Comparison
from ptq_exp.evaluation.similarity import SSIM_WINDOW
from ptq_exp.experiment.run import Run
from ptq_exp.experiment.scores import Scored, Scorer
from ptq_exp.experiment.stage import Made, Record
from ptq_exp.results.worst_pairs import FILE, WORST
from ptq_exp.settings.schema import EvaluationConfig
from ptq_exp.storage.atomic import write_npz

log = logging.getLogger("ptq_exp")


class PairScorer:
    """PSNR, SSIM, LPIPS, CLIP score and FID between the images of two models, each with its interval.

    Raises:
        PTQError: weights that a score needs are missing or damaged, or the model's images do not allow a score.
    """

    def __init__(self, run: Run, config: EvaluationConfig) -> None:
        self.config, self.names = config, config.pair_scores
        self.prompts = _prompts(run, config.n_samples)
        _check_images(run, config, self.prompts)
        device = str(run.device)
        self.perceptual = None if config.lpips is None else Perceptual.load(config.lpips, device)
        self.image_text = None if config.clip is None else ImageText.load(config.clip, device)
        self._shape = run.model.image_shape
        unset = [f"{what} (evaluation.{key})" for key, what in (("lpips", "LPIPS"), ("clip", "CLIP score"))
                 if getattr(config, key) is None]
        if config.pairs and unset:
            log.info("not measured, as nothing says where their weights are: %s", ", ".join(unset))

    def spec(self) -> dict[str, str]:
        """Return what identifies LPIPS and CLIP scores."""
        spec = {}
        if self.perceptual is not None:
            factor = self.perceptual.factor(*self._shape[1:])
            spec["lpips"] = self.perceptual.name + (f", images enlarged {factor} times" if factor > 1 else "")
        if self.image_text is not None:
            spec["clip"] = self.image_text.name
        return spec

    def __call__(
        self, images: np.ndarray, fp_images: np.ndarray, ours: Scored, theirs: Scored, scorer: Scorer
    ) -> Made:
        """Compare the images; returns their scores, and the intervals of these for results.json.

        Args:
            ours, theirs: scores and features of both, from `scorer`.
        """
        values, fp_values = self.values(images, fp_images)
        metrics = {name: float(found.mean()) for name, found in values.items()}
        fp_metrics = {name: float(found.mean()) for name, found in fp_values.items()}
        for name in self.names:
            if SCORES[name].to_full_precision is not None:
                metrics[name] = SCORES[name].to_full_precision(Comparison(ours.features, theirs.features))
        metrics |= scorer.paired(ours.scores | metrics, theirs.scores | fp_metrics)
        intervals = self._of_pairs(values, fp_values) | self._of_features(metrics, ours, theirs, scorer)
        numbers = {"fp32": fp_metrics, "intervals": {name: list(found) for name, found in intervals.items()},
                   "resamples": self._resamples(intervals)}
        return Made(metrics, Record(numbers, {FILE: partial(self._write, values=values, fp_images=fp_images)}))

    def values(
        self, images: np.ndarray, fp_images: np.ndarray
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Compute the scores of each pair, and those that full-precision images have by themselves; each [N]."""
        prompts = None if self.prompts is None else self.prompts[: len(images)]
        pairs = Pairs(images, fp_images, prompts, self.perceptual, self.image_text)
        found = {name: SCORES[name].pair(pairs) for name in self.names if SCORES[name].pair is not None}
        return found, {name: SCORES[name].pair(pairs.of_full_precision) for name in found if SCORES[name].alone}

    def _of_pairs(self, values: dict[str, np.ndarray], fp_values: dict[str, np.ndarray]) -> dict[str, Any]:
        """Compute the intervals of means over pairs."""
        if not self.config.resamples:
            return {}
        interval = partial(pair_interval, resamples=self.config.resamples, prompts=self.prompts)
        changes = {name: score.change_of for name, score in SCORES.items() if score.change_of in fp_values}
        return {name: interval(found) for name, found in values.items()} | {
            name: interval(values[base], fp_values[base]) for name, base in changes.items()
        }

    def _of_features(self, metrics: dict[str, float], ours: Scored, theirs: Scored, scorer: Scorer) -> dict[str, Any]:
        """Compute the intervals of scores that are no means."""
        if ours.features is None:
            return {}
        found = change_intervals(ours.features, theirs.features, scorer.reference, metrics,
                                 resamples=self.config.fid_resamples, prompts=self.prompts)
        if "fid_increase" in found and "fid_increase_units" in metrics:
            unit = scorer.real_data["half_split_fid"]
            found["fid_increase_units"] = tuple(bound / unit for bound in found["fid_increase"])
        return found

    def _resamples(self, intervals: dict[str, Any]) -> dict[str, int]:
        """Return over how many resamples the intervals were computed."""
        of_features = {name for name, score in SCORES.items() if score.to_full_precision or score.function}
        of_features |= {name for name, score in SCORES.items() if score.change_of in of_features}
        found = {"pairs": self.config.resamples} if set(intervals) - of_features - {"fid_increase_units"} else {}
        return found | ({"features": self.config.fid_resamples} if set(intervals) & of_features else {})

    def _write(self, path: Any, values: dict[str, np.ndarray], fp_images: np.ndarray) -> None:
        """Write the values of all pairs, and the full-precision images of the worst ones."""
        worst = np.argsort(values["psnr"], kind="stable")[:WORST]
        prompts = {} if self.prompts is None else {"prompts": np.array(self.prompts, dtype=str)}
        write_npz(path, **values, **prompts, worst=worst, worst_fp32=np.stack([fp_images[i] for i in worst]))


def _prompts(run: Run, n: int) -> Sequence[str] | None:
    """Return the text that each image is drawn from; None where the model draws from none."""
    prompts = getattr(run.model, "prompts", None)
    return None if prompts is None else prompts(range(n), run.seed)


def _check_images(run: Run, config: EvaluationConfig, prompts: Sequence[str] | None) -> None:
    """Raise ConfigError for a score that the model's images do not allow."""
    _, height, width = run.model.image_shape
    if "ssim" in config.pair_scores and min(height, width) < SSIM_WINDOW:
        raise ConfigError(f"evaluation.pairs=ssim: SSIM needs images of {SSIM_WINDOW}x{SSIM_WINDOW} or more, those of "
                          f"model={run.model.name} are {width}x{height}; leave it out")
    if config.clip is not None and prompts is None:
        raise ConfigError(f"evaluation.clip: the CLIP score compares images with prompts, and model={run.model.name} "
                          "draws from none; set it to null")
