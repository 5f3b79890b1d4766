"""The small data set, diffusion model and feature extractor that are shipped inside the package."""

from ptq_exp.embedded.digits import digits
from ptq_exp.embedded.load import DigitsExtractor, card, digits_model, digits_reference

__all__ = ["DigitsExtractor", "card", "digits", "digits_model", "digits_reference"]
