"""The scores of a run's images against one reference, and what identifies these numbers."""

from __future__ import annotations

import logging
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ptq_exp.evaluation import FeatureStatistics, half_split_fid, inception_score, score
from ptq_exp.evaluation.scores import SCORES
from ptq_exp.experiment.features import Reference, full_precision_features, image_features
from ptq_exp.experiment.run import Run
from ptq_exp.experiment.stage import Key
from ptq_exp.settings.schema import EvaluationConfig

log = logging.getLogger("ptq_exp")


class Scored(NamedTuple):
    """Scores of a set of images, and its features where they are needed again."""

    scores: dict[str, float]
    features: FeatureStatistics | None = None


class Scorer:
    """IS, FID, sFID, precision and recall against one reference; no scores at all without an extractor."""

    def __init__(self, run: Run, config: EvaluationConfig, reference: Reference | None) -> None:
        self.run, self.config, self.reference = run, config, reference
        between = any(SCORES[name].to_full_precision is not None for name in config.pair_scores)
        self._keeps = between or config.fid_resamples > 0
        self._looks = run.extractor is not None and (reference is not None or between)
        if reference is None:
            log.info("no IS, FID, sFID: evaluation=%s compares images with those of full precision alone; add "
                     "evaluation=adm evaluation.reference=PATH for scores", config.name)

    def __call__(self, images: np.ndarray, title: str, key: Key) -> Scored:
        """Score `images`; `key` says which they are."""
        return self._scored(image_features(self.run, images, title, key)) if self._looks else Scored({})

    def full_precision(self, images: np.ndarray, key: Key) -> Scored:
        """Score the full-precision images, whose features are shared by runs."""
        return self._scored(full_precision_features(self.run, images, key)) if self._looks else Scored({})

    def _scored(self, features: FeatureStatistics) -> Scored:
        asked = self.run.model.asked(range(len(features.pooled)), self.run.seed)
        scores = {} if self.reference is None else score(features, self.reference, asked)
        return Scored(scores, features if self._keeps else None)

    @cached_property
    def real_data(self) -> dict[str, float]:
        """What the real images score, and the unit of the paired increase; empty where only moments are stored."""
        features = getattr(self.reference, "features", self.reference)
        if features is None:
            return {}
        return {"is": inception_score(features.probabilities), "half_split_fid": half_split_fid(features.pooled)}

    def paired(self, metrics: dict[str, float], fp_scores: dict[str, float]) -> dict[str, float]:
        """Compute changes from the full-precision images of the same seeds, that of FID in half-split units, too."""
        changes = {
            name: metrics[entry.change_of] - fp_scores[entry.change_of]
            for name, entry in SCORES.items() if entry.change_of in metrics and entry.change_of in fp_scores
        }
        unit = self.real_data.get("half_split_fid")
        return changes | ({"fid_increase_units": changes["fid_increase"] / unit} if unit and changes else {})

    def metric_spec(self) -> dict:
        """Return the five things that identify a number."""
        extractor = self.run.extractor
        return {
            "extractor": extractor.name if extractor else "none",
            "preprocessing": extractor.preprocessing if extractor else "none",
            "reference": self.reference.name if self.reference else "none",
            "n_samples": self.config.n_samples,
            "seed": self.run.seed,
        }
