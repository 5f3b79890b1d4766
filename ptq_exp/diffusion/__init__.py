"""Diffusion models as denoisers, their time convention, and one sampler."""

from ptq_exp.diffusion.call import Call, to_device
from ptq_exp.diffusion.conditions import ConditionTable
from ptq_exp.diffusion.denoisers import ClassConditionalUNet, DiTDenoiser, FirstStage, LabelledUNet, UNetDenoiser
from ptq_exp.diffusion.first_evaluations import check_network, wider
from ptq_exp.diffusion.guidance import Guided, both_halves
from ptq_exp.diffusion.model import DiffusionModel, SamplerDefaults
from ptq_exp.diffusion.noise import SampleNoise
from ptq_exp.diffusion.paired import relative_eps_error
from ptq_exp.diffusion.parts import InParts
from ptq_exp.diffusion.prediction import PREDICTIONS, AsEps, as_eps
from ptq_exp.diffusion.sampler import (
    StepCoefficients,
    StepRecord,
    ddim_step,
    padded_batches,
    sample,
    step_coefficients,
)
from ptq_exp.diffusion.solvers import SOLVERS, solver_grid
from ptq_exp.diffusion.time_grid import NoiseSchedule, TimeGrid

__all__ = [
    "PREDICTIONS",
    "SOLVERS",
    "AsEps",
    "Call",
    "ClassConditionalUNet",
    "ConditionTable",
    "DiTDenoiser",
    "DiffusionModel",
    "FirstStage",
    "Guided",
    "InParts",
    "LabelledUNet",
    "NoiseSchedule",
    "SampleNoise",
    "SamplerDefaults",
    "StepCoefficients",
    "StepRecord",
    "TimeGrid",
    "UNetDenoiser",
    "as_eps",
    "both_halves",
    "check_network",
    "ddim_step",
    "padded_batches",
    "relative_eps_error",
    "sample",
    "solver_grid",
    "step_coefficients",
    "to_device",
    "wider",
]
