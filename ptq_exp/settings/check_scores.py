"""Refuse scores that a run cannot measure, and gates on scores that it does not measure, before it starts."""

from __future__ import annotations

import math

from ptq_exp.errors import ConfigError
from ptq_exp.evaluation.scores import SCORES, Score
from ptq_exp.settings.schema import FULL_PRECISION, EvaluationConfig, ExperimentConfig


def check_scores(config: ExperimentConfig) -> None:
    """Raise ConfigError for the first score in `evaluation.pairs` or `evaluation.gate` that cannot be."""
    evaluation = config.evaluation
    of_pairs = [name for name, score in SCORES.items() if _is_of_pairs(score)]
    for name in evaluation.pairs:
        if name not in of_pairs:
            raise ConfigError(f"evaluation.pairs={name}: no score of pairs; choose from {', '.join(of_pairs)}")
        if name in ("lpips", "clip_score") and name.partition("_")[0] not in _given(evaluation):
            raise ConfigError(f"evaluation.pairs={name}: its weights are not there; set {SCORES[name].needs}")
    if "fid_to_fp" in evaluation.pairs and evaluation.extractor is None:
        raise ConfigError(
            "evaluation.pairs=fid_to_fp compares features, but evaluation.extractor=null: choose an extractor, or "
            "leave fid_to_fp out"
        )
    measured = measured_scores(config)
    for name, bound in (evaluation.gate or {}).items():
        if name not in SCORES:
            raise ConfigError(f"evaluation.gate.{name}: no such score; choose from {', '.join(SCORES)}")
        if not math.isfinite(bound):
            raise ConfigError(f"evaluation.gate.{name}={bound}: choose a finite number")
        if name not in measured:
            raise ConfigError(f"evaluation.gate.{name}: this run does not measure it, only {', '.join(measured)}; "
                              f"{_remedy(SCORES[name], config)}")


def measured_scores(config: ExperimentConfig) -> list[str]:
    """List the scores that a run measures, as far as its settings tell."""
    evaluation, quantized = config.evaluation, config.bits.name != FULL_PRECISION
    features = evaluation.extractor is not None and evaluation.reference is not None

    def is_measured(name: str) -> bool:
        score = SCORES[name]
        if score.function is not None:
            return features
        if not quantized:
            return False
        if score.change_of:
            return is_measured(score.change_of)
        return name in evaluation.pair_scores if _is_of_pairs(score) else features or name != "fid_increase_units"

    return [name for name in SCORES if is_measured(name)]


def _is_of_pairs(score: Score) -> bool:
    return score.pair is not None or score.to_full_precision is not None


def _given(evaluation: EvaluationConfig) -> list[str]:
    """Return which of the settings with weights of scores are set."""
    return [key for key in ("lpips", "clip") if getattr(evaluation, key) is not None]


def _remedy(score: Score, config: ExperimentConfig) -> str:
    base = SCORES[score.change_of] if score.change_of else score
    if config.bits.name == FULL_PRECISION and base.function is None:
        return "choose bits=w8a8 or another, there are no pairs in full precision"
    return f"set {base.needs}" if base.needs else "set evaluation.extractor and evaluation.reference"
