"""Diffusion models as denoisers, their time convention, and one sampler."""

from ptq_exp.diffusion.compare import relative_eps_error
from ptq_exp.diffusion.model import DiffusionModel, UNetDenoiser
from ptq_exp.diffusion.noise import SampleNoise
from ptq_exp.diffusion.sampler import StepRecord, ddim_step, padded_batches, sample
from ptq_exp.diffusion.time_grid import TimeGrid

__all__ = [
    "DiffusionModel", "SampleNoise", "StepRecord", "TimeGrid", "UNetDenoiser", "ddim_step", "padded_batches",
    "relative_eps_error", "sample",
]  # fmt: skip
