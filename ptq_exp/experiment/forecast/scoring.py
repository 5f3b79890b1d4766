"""How long features of images, scores of them and intervals of scores take on this machine now."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np
import torch

from ptq_exp.evaluation import change_intervals, extract_features
from ptq_exp.evaluation.scores import score
from ptq_exp.evaluation.statistics import FeatureStatistics
from ptq_exp.experiment.features import FEATURE_BATCH
from ptq_exp.experiment.forecast.pairs import images_of_noise
from ptq_exp.experiment.forecast.probe import Line, line, measured
from ptq_exp.experiment.run import Run

_CPU = torch.device("cpu")
_RESAMPLES = 8  # of scores, at most, that are timed


class Scoring:
    """Measured speeds of scoring the images of one run, each when it is first asked for."""

    def __init__(self, run: Run) -> None:
        self.run = run

    @cached_property
    def features(self) -> Line:
        """The speed of the feature extractor."""
        run = self.run
        return line(lambda n: extract_features(run.extractor, images_of_noise(run, n)), FEATURE_BATCH, run.device)

    def scored(self, n: int, real: int) -> float:
        """Return the seconds of scoring `n` images against `real` ones."""
        ours, theirs = (self._features(min(m, 512)) for m in (n, real or n))
        seconds, _ = measured(lambda: score(ours, theirs), _CPU)
        pairs = n * (real or n) / (len(ours) * len(theirs))  # precision and recall compare all with all
        return seconds * max(1.0, pairs)

    def resampled(self, n: int, resamples: int) -> float:
        """Return the seconds of the intervals of FID, sFID and IS."""
        if not resamples:
            return 0.0
        ours, real = self._features(n), self._features(2 * n)
        wanted = {"fid_increase": 0.0, "sfid_increase": 0.0, "is_increase": 0.0}
        seconds = line(lambda tried: change_intervals(ours, ours, real, wanted, resamples=tried), _RESAMPLES, _CPU)
        return seconds.seconds(resamples)

    @cached_property
    def _seen(self) -> FeatureStatistics:
        return extract_features(self.run.extractor, images_of_noise(self.run, FEATURE_BATCH))

    def _features(self, n: int) -> FeatureStatistics:
        """Return features of `n` images that were never drawn: mixtures of those of noise."""
        draw = np.random.default_rng(n)
        mix = draw.dirichlet(np.ones(len(self._seen)), n).astype(np.float32)
        mixed = {name: mix @ getattr(self._seen, name) for name in ("pooled", "spatial", "probabilities")}
        return replace(self._seen, **mixed)
