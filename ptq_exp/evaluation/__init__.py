"""Images, features and metrics. Knows nothing of models, quantization or experiments."""

from ptq_exp.evaluation.images import from_uint8, image_grid, mean_psnr, psnr, to_uint8
from ptq_exp.evaluation.metrics import frechet_distance, frechet_distance_from_features, inception_score
from ptq_exp.evaluation.reference import FeatureStatistics, half_split_fid, score

__all__ = [
    "FeatureStatistics",
    "frechet_distance",
    "frechet_distance_from_features",
    "from_uint8",
    "half_split_fid",
    "image_grid",
    "inception_score",
    "mean_psnr",
    "psnr",
    "score",
    "to_uint8",
]
