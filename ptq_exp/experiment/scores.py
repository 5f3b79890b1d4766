"""The scores of a run's images against one reference, and what identifies these numbers."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from ptq_exp.evaluation import half_split_fid, inception_score, score
from ptq_exp.experiment import stages
from ptq_exp.experiment.run import Setup

log = stages.log


class Scorer:
    """IS, FID, sFID, precision and recall against one reference; no scores at all without an extractor."""

    def __init__(self, setup: Setup, reference: stages.Reference | None) -> None:
        self.setup, self.reference = setup, reference
        if reference is None:
            log.info("no IS, FID, sFID: evaluation=%s compares images with their full-precision twins alone; add "
                     "evaluation=adm evaluation.reference=PATH for scores", setup.config.evaluation.name)  # fmt: skip

    def __call__(self, images: np.ndarray, title: str, spec: dict) -> dict[str, float]:
        """Scores of `images`; `spec` says which they are."""
        if self.reference is None:
            return {}
        return score(stages.image_features(self.setup, images, title, spec), self.reference)

    def full_precision(self, images: np.ndarray) -> dict[str, float]:
        """Scores of the full-precision images, whose features are shared by runs."""
        if self.reference is None:
            return {}
        return score(stages.full_precision_features(self.setup, images), self.reference)

    @cached_property
    def real_data(self) -> dict[str, float]:
        """What the real images score, and the unit of the paired increase; empty where only moments are stored."""
        features = getattr(self.reference, "features", self.reference)
        if features is None:
            return {}
        return {"is": inception_score(features.probabilities), "half_split_fid": half_split_fid(features.pooled)}

    def paired(self, metrics: dict[str, float], fp_scores: dict[str, float]) -> dict[str, float]:
        """FID increase over the full-precision twin of the same seeds, absolute and in half-split units."""
        if self.reference is None:
            return {}
        increase = metrics["fid"] - fp_scores["fid"]
        unit = self.real_data.get("half_split_fid")
        return {"fid_increase": increase} | ({"fid_increase_units": increase / unit} if unit else {})

    def metric_spec(self) -> dict:
        """The five things that identify a number."""
        extractor = self.setup.extractor
        return {
            "extractor": extractor.name if extractor else "none",
            "preprocessing": extractor.preprocessing if extractor else "none",
            "reference": self.reference.name if self.reference else "none",
            "n_samples": self.setup.config.evaluation.n_samples,
            "seed": self.setup.config.seed,
        }
