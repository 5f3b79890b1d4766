"""The small data set, diffusion models, pipelines and feature extractor that are shipped inside the package."""

from ptq_exp.embedded.digits import digits
from ptq_exp.embedded.latent import digits_dit_model, digits_ldm_model
from ptq_exp.embedded.load import DigitsExtractor, digits_model, digits_reference, pipeline_folder
from ptq_exp.embedded.weights_file import card

__all__ = [
    "DigitsExtractor", "card", "digits", "digits_dit_model", "digits_ldm_model", "digits_model", "digits_reference",
    "pipeline_folder",
]
