"""Calibration sets: where states come from, and how they are distributed over time steps."""

from ptq_exp.calibration.bins import TEMPORAL, check_bins, time_bins
from ptq_exp.calibration.calibration_set import CalibrationSet, condition_arrays
from ptq_exp.calibration.sources import SOURCES, WITHOUT_IMAGES, StateRequest, chosen_images, source
from ptq_exp.calibration.time_labels import LABELS, Labelled, labelled
from ptq_exp.calibration.timesteps import Constant, Normal, SkewNormal, Uniform, positions

__all__ = [
    "LABELS", "SOURCES", "TEMPORAL", "WITHOUT_IMAGES", "CalibrationSet", "Constant", "Labelled", "Normal", "SkewNormal",
    "StateRequest", "Uniform", "check_bins", "chosen_images", "condition_arrays", "labelled", "positions", "source",
    "time_bins",
]
