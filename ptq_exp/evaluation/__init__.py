"""Images, features and metrics. Knows nothing of models, quantization or experiments."""

from ptq_exp.evaluation.data import content_digest, open_images
from ptq_exp.evaluation.features import FeatureExtractor, extract_features
from ptq_exp.evaluation.image_source import ImageSource
from ptq_exp.evaluation.images import from_uint8, image_grid, mean_psnr, psnr, to_uint8
from ptq_exp.evaluation.inception import InceptionExtractor
from ptq_exp.evaluation.manifold import precision_recall
from ptq_exp.evaluation.metrics import frechet_distance, frechet_distance_from_features, inception_score
from ptq_exp.evaluation.reference import half_split_fid, score
from ptq_exp.evaluation.reference_files import load_reference
from ptq_exp.evaluation.statistics import FeatureStatistics, GaussianStatistics, load_statistics

__all__ = [
    "FeatureExtractor",
    "FeatureStatistics",
    "GaussianStatistics",
    "ImageSource",
    "InceptionExtractor",
    "content_digest",
    "extract_features",
    "frechet_distance",
    "frechet_distance_from_features",
    "from_uint8",
    "half_split_fid",
    "image_grid",
    "inception_score",
    "load_reference",
    "load_statistics",
    "mean_psnr",
    "open_images",
    "precision_recall",
    "psnr",
    "score",
    "to_uint8",
]
