"""The entries of results.json that are scores, with their intervals and bounds, and what identifies them."""

from __future__ import annotations

from ptq_exp.results.entry import GATED, QUANTIZED, SCORED, Entry

_SCORE, _ERRORS = "evaluation.score", "experiment.noise_record.eps_errors"
_SPEC, _PAIR_SPEC = "experiment.scores.Scorer.metric_spec", "experiment.pairs.PairScorer.spec"
_PAIRS, _GATE = "experiment.pairs.PairScorer", "evaluation.gate.judged"

SCORE_ENTRIES = (
    Entry("metric_spec.extractor", "network of the features", "name", _SPEC),
    Entry("metric_spec.preprocessing", "what it does to images", "text", _SPEC),
    Entry("metric_spec.reference", "what images are compared with", "text", _SPEC),
    Entry("metric_spec.n_samples", "images that were drawn", "count", _SPEC),
    Entry("metric_spec.seed", "of the images", "integer", _SPEC),
    Entry("metric_spec.lpips", "trunk of LPIPS, digest of its weights, and how images were enlarged", "text",
          _PAIR_SPEC, "quantized runs with `evaluation.lpips`"),
    Entry("metric_spec.clip", "CLIP model and digest of its weights", "text", _PAIR_SPEC,
          "quantized runs with `evaluation.clip`"),
    Entry("real.is", "Inception Score of the real images", "1", "experiment.scores.Scorer.real_data",
          "runs whose reference has the features of images"),
    Entry("real.half_split_fid", "FID between two random halves of the real images: the unit of "
          "`metrics.fid_increase_units`", "1", "experiment.scores.Scorer.real_data",
          "runs whose reference has the features of images"),
    Entry("fp32.*", "scores of the full-precision images of the same seeds, named as in `metrics`", "see `metrics`",
          _SCORE, SCORED),
    Entry("metrics.fid_increase", "FID minus that of the full-precision images of the same seeds", "1",
          "experiment.scores.Scorer.paired", f"quantized {SCORED}"),
    Entry("metrics.fid_increase_units", "the same over `real.half_split_fid`", "1", "experiment.scores.Scorer.paired",
          f"quantized {SCORED}"),
    Entry("metrics.sfid_increase", "sFID minus that of the full-precision images of the same seeds", "1",
          "experiment.scores.Scorer.paired", f"quantized {SCORED}"),
    Entry("metrics.is_increase", "IS minus that of the full-precision images of the same seeds", "1",
          "experiment.scores.Scorer.paired", f"quantized {SCORED}"),
    Entry("metrics.psnr", "PSNR to the full-precision images of the same seeds, mean over images", "dB",
          "evaluation.images.capped_psnr", QUANTIZED),
    Entry("metrics.ssim", "SSIM to the full-precision images of the same seeds, mean over images", "-1 to 1",
          "evaluation.ssim", "quantized runs with `ssim` in `evaluation.pairs`"),
    Entry("metrics.lpips", "LPIPS to the full-precision images of the same seeds, mean over images", "1",
          "evaluation.lpips", "quantized runs with `evaluation.lpips`"),
    Entry("metrics.clip_score", "CLIP score of image and prompt, mean over images; `fp32.clip_score`: that of the "
          "full-precision images", "0 to 100", "evaluation.clip_score", "quantized runs with `evaluation.clip`"),
    Entry("metrics.clip_score_change", "the difference of the two", "1", "experiment.scores.Scorer.paired",
          "quantized runs with `evaluation.clip`"),
    Entry("metrics.fid_to_fp", "FID between these and the full-precision images of the same seeds", "1", _PAIRS,
          "quantized runs with `fid_to_fp` in `evaluation.pairs`"),
    Entry("metrics.eps_error*", "mean of `eps_error_per_step`; `_without_last`: but for the last step, "
          "`_uncorrected`: without the correction", "1", _ERRORS, QUANTIZED),
    Entry("metrics.fixed_pattern_share*", "mean of `fixed_pattern_share_per_step`; `_uncorrected`: without the "
          "correction", "0 to 1", _ERRORS, QUANTIZED),
    Entry("metrics.*", "scores of the images: `fid`, `sfid` (less is better), `is`, `precision`, `recall` (more is "
          "better); `prompt_accuracy` where prompts name a class (more is better)", "1", _SCORE, SCORED),
    Entry("intervals.*", "95 % interval of a score of `metrics`, by a paired bootstrap over the images of the run",
          "[low, high], unit of the score", _PAIRS, QUANTIZED),
    Entry("resamples.pairs", "resamples behind the intervals of means over pairs", "count", _PAIRS, QUANTIZED),
    Entry("resamples.features", "resamples behind the intervals of FID, sFID and IS", "count", _PAIRS,
          "quantized runs with `evaluation.fid_resamples`"),
    Entry("gate.passed", "whether all scores reach their bounds", "true or false", _GATE, GATED),
    Entry("gate.bounds.*", "bound of each score", "unit of the score", _GATE, GATED),
    Entry("gate.missed.*", "`value`, `bound` and difference `by` of each score that misses its bound; null where it "
          "was not measured", "unit of the score", _GATE, GATED),
)
