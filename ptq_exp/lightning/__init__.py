"""Thin Lightning adapters: they run calibration, evaluation and the training of the embedded networks."""

from ptq_exp.lightning.calibration import CalibrationModule, collect_calibration_set
from ptq_exp.lightning.evaluation import EvaluationModule, draw_images
from ptq_exp.lightning.noise import NoiseModule, PropagationModule, measure
from ptq_exp.lightning.reconstruction import reconstruct_network
from ptq_exp.lightning.trainer import make_trainer

__all__ = [
    "CalibrationModule", "EvaluationModule", "NoiseModule", "PropagationModule", "collect_calibration_set",
    "draw_images", "make_trainer", "measure", "reconstruct_network",
]  # fmt: skip
