"""Quantizer modules: what all share (`base`), of activations, and of weights."""

from ptq_exp.quantization.quantizer.activation import ActivationQuantizer
from ptq_exp.quantization.quantizer.base import Mode, Quantizer
from ptq_exp.quantization.quantizer.dynamic import DynamicQuantizer
from ptq_exp.quantization.quantizer.weight import WeightQuantizer

__all__ = ["ActivationQuantizer", "DynamicQuantizer", "Mode", "Quantizer", "WeightQuantizer"]
