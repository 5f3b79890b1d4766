"""Images, features and scores. Knows nothing of models, quantization or experiments.

Names are imported when they are used: a table of scores needs their headings, not torch.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "bootstrap": ("paired_bootstrap",),
    "data": ("content_digest", "open_images"),
    "features": ("FeatureExtractor", "extract_features"),
    "image_source": ("ImageSource",),
    "images": ("from_uint8", "image_grid", "mean_psnr", "psnr", "to_uint8"),
    "gate": ("gate_line", "judged"),
    "image_text": ("ImageText", "clip_score"),
    "inception": ("InceptionExtractor",),
    "intervals": ("change_intervals", "pair_interval"),
    "kernel": ("kernel_distance",),
    "manifold": ("precision_recall",),
    "metrics": ("frechet_distance", "frechet_distance_from_features", "inception_score"),
    "pairs": ("Pairs",),
    "perceptual": ("Perceptual", "lpips"),
    "prompts": ("prompt_accuracy",),
    "reference_files": ("load_reference",),
    "scores": ("SCORES", "Comparison", "Score", "half_split_fid", "score"),
    "similarity": ("ssim",),
    "statistics": ("FeatureStatistics", "GaussianStatistics", "load_statistics"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)
