"""The scores of a run's images against one reference, and what identifies these numbers."""

from __future__ import annotations

import logging
from functools import cached_property

import numpy as np

from ptq_exp.evaluation import half_split_fid, inception_score, score
from ptq_exp.experiment.features import Reference, full_precision_features, image_features
from ptq_exp.experiment.run import Run
from ptq_exp.experiment.stage import Key
from ptq_exp.settings.schema import EvaluationConfig

log = logging.getLogger("ptq_exp")


class Scorer:
    """IS, FID, sFID, precision and recall against one reference; no scores at all without an extractor."""

    def __init__(self, run: Run, config: EvaluationConfig, reference: Reference | None) -> None:
        self.run, self.config, self.reference = run, config, reference
        if reference is None:
            log.info("no IS, FID, sFID: evaluation=%s compares images with those of full precision alone; add "
                     "evaluation=adm evaluation.reference=PATH for scores", config.name)

    def __call__(self, images: np.ndarray, title: str, key: Key) -> dict[str, float]:
        """Score `images`; `key` says which they are."""
        if self.reference is None:
            return {}
        return score(image_features(self.run, images, title, key), self.reference)

    def full_precision(self, images: np.ndarray, key: Key) -> dict[str, float]:
        """Score the full-precision images, whose features are shared by runs."""
        if self.reference is None:
            return {}
        return score(full_precision_features(self.run, images, key), self.reference)

    @cached_property
    def real_data(self) -> dict[str, float]:
        """What the real images score, and the unit of the paired increase; empty where only moments are stored."""
        features = getattr(self.reference, "features", self.reference)
        if features is None:
            return {}
        return {"is": inception_score(features.probabilities), "half_split_fid": half_split_fid(features.pooled)}

    def paired(self, metrics: dict[str, float], fp_scores: dict[str, float]) -> dict[str, float]:
        """FID increase over the full-precision images of the same seeds, absolute and in half-split units."""
        if self.reference is None:
            return {}
        increase = metrics["fid"] - fp_scores["fid"]
        unit = self.real_data.get("half_split_fid")
        return {"fid_increase": increase} | ({"fid_increase_units": increase / unit} if unit else {})

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
