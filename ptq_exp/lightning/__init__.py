"""Thin Lightning adapters: they run calibration, evaluation, analysis and reconstruction."""

from ptq_exp.lightning.analysis import ActivationModule, SensitivityModule, measure_sensitivity
from ptq_exp.lightning.calibration import CalibrationModule, collect_calibration_set
from ptq_exp.lightning.evaluation import EvaluationModule, draw_images
from ptq_exp.lightning.noise import NoiseModule, PropagationModule
from ptq_exp.lightning.progress import Bar
from ptq_exp.lightning.reconstruction import reconstruct_network
from ptq_exp.lightning.recording import RecordingModule, record_calibration_set
from ptq_exp.lightning.trainer import make_trainer
from ptq_exp.lightning.writer import measure

__all__ = [
    "ActivationModule", "Bar", "CalibrationModule", "EvaluationModule", "NoiseModule", "PropagationModule",
    "RecordingModule", "SensitivityModule", "collect_calibration_set", "draw_images", "make_trainer", "measure",
    "measure_sensitivity", "reconstruct_network", "record_calibration_set",
]
