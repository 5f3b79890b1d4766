"""How long LPIPS, CLIP scores and SSIM of pairs of images take on this machine now."""

from __future__ import annotations

import numpy as np

from ptq_exp.experiment.forecast.probe import line
from ptq_exp.experiment.pairs import PairScorer
from ptq_exp.experiment.run import Run
from ptq_exp.settings.schema import EvaluationConfig

_MOST = 64  # pairs that are timed


def compared_seconds(run: Run, evaluation: EvaluationConfig, n: int) -> float:
    """Return the seconds of LPIPS and CLIP scores of `n` pairs; without them SSIM takes next to nothing.

    Raises:
        PTQError: weights that a score needs are missing or damaged.
    """
    if evaluation.lpips is None and evaluation.clip is None:
        return 0.0
    scorer = PairScorer(run, evaluation)

    def compare(several: int) -> None:
        images = images_of_noise(run, several)
        scorer.values(images, images)

    return line(compare, min(n, _MOST), run.device).seconds(n)


def images_of_noise(run: Run, n: int) -> np.ndarray:
    """Return `n` images of noise in the shape of the model's, uint8 [N, H, W, C]."""
    channels, height, width = run.model.image_shape
    return np.random.default_rng(0).integers(0, 256, (n, height, width, channels), dtype=np.uint8)
