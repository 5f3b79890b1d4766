"""Calibration sets: where states come from, and how they are distributed over time steps."""

from ptq_exp.calibration.calibration_set import CalibrationSet
from ptq_exp.calibration.sources import SOURCES, StateRequest, source
from ptq_exp.calibration.timesteps import Constant, Normal, SkewNormal, Uniform, positions

__all__ = [
    "SOURCES", "CalibrationSet", "Constant", "Normal", "SkewNormal", "StateRequest", "Uniform", "positions", "source",
]  # fmt: skip
